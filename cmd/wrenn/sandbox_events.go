package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/client"
)

// followEvery is how often --follow asks for news.
const followEvery = 500 * time.Millisecond

func newSandboxEventsCmd() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use:   "events SANDBOX",
		Short: "Show what happened to a sandbox, and why",
		Long: `Show what happened to a sandbox: every operation with its result, time limits,
and what the server found out by itself. The log can be read for a week after
the sandbox was deleted. With --json there is one object in each line.`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeFirst(completeSandboxes("")),
		RunE: func(cmd *cobra.Command, a []string) error {
			c, err := connect()
			if err != nil {
				return err
			}
			every := time.Duration(0)
			if follow {
				every = followEvery
			}
			o := outputOf(cmd)
			for e, err := range c.SandboxEvents(cmd.Context(), a[0], every) {
				if err != nil {
					return err
				}
				if err := o.event(e); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens, until the sandbox is deleted")
	return cmd
}

// event prints a line at once, so that --follow shows it when it happens.
func (o output) event(e client.SandboxEvent) error {
	if o.json {
		return json.NewEncoder(o.w).Encode(e)
	}
	took := ""
	if e.DurationMS > 0 {
		took = (time.Duration(e.DurationMS) * time.Millisecond).String()
	}
	line := fmt.Sprintf("%s  %-8s  %-8s  %7s  %s", stamp(e.At), printable(e.Type), printable(e.Status), took, printable(e.Detail))
	if e.Error != "" {
		line += "  failed: " + printable(e.Error)
	}
	_, err := fmt.Fprintln(o.w, line)
	return err
}
