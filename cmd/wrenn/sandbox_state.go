package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/client"
)

func newSandboxPauseCmd() *cobra.Command {
	return stateCmd("pause", "Write sandboxes to disk and free their memory and CPU",
		`The command returns when the whole state is durable. A pause that fails leaves
the sandbox running.`, client.StatusRunning, (*client.Client).PauseSandbox)
}

func newSandboxResumeCmd() *cobra.Command {
	return stateCmd("resume", "Bring paused sandboxes back, every process still running",
		`A resume that fails leaves the sandbox paused.`, client.StatusPaused, (*client.Client).ResumeSandbox)
}

// stateCmd is a command that moves each named sandbox to another state.
func stateCmd(verb, short, long, from string,
	move func(*client.Client, context.Context, string) (*client.Sandbox, error)) *cobra.Command {
	return &cobra.Command{
		Use:               verb + " SANDBOX...",
		Short:             short,
		Long:              short + ".\n\n" + long,
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeSandboxes(from),
		RunE: func(cmd *cobra.Command, a []string) error {
			c, err := connect()
			if err != nil {
				return err
			}
			var errs []error
			var moved []client.Sandbox
			for _, id := range a {
				sb, err := move(c, cmd.Context(), id)
				if err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", id, err))
					continue
				}
				moved = append(moved, *sb)
			}
			return errors.Join(append(errs, printMoved(outputOf(cmd), len(a) == 1, moved))...)
		},
	}
}

func printMoved(o output, one bool, moved []client.Sandbox) error {
	if one && len(moved) == 1 && o.json {
		return o.printJSON(moved[0]) // the API's own answer
	}
	if len(moved) == 0 && !o.json {
		return nil
	}
	if one && len(moved) == 0 {
		return nil
	}
	return o.sandboxes(moved)
}

func newSandboxForkCmd() *cobra.Command {
	var count int
	cmd := &cobra.Command{
		Use:   "fork SANDBOX",
		Short: "Start new sandboxes in the present state of one",
		Long: `Start new sandboxes in the present state of one, which goes on. Each is a new
individual: own ID, host name, randomness and tokens.`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeFirst(completeSandboxes("")),
		RunE: func(cmd *cobra.Command, a []string) error {
			if count < 1 {
				return usagef("--count %d: want at least 1", count)
			}
			c, err := connect()
			if err != nil {
				return err
			}
			list, err := c.ForkSandbox(cmd.Context(), a[0], count)
			if len(list) == 0 && err != nil {
				return err
			}
			return errors.Join(err, outputOf(cmd).sandboxes(list))
		},
	}
	cmd.Flags().IntVarP(&count, "count", "n", 1, "how many")
	return cmd
}

func newSandboxTimeoutCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "timeout SANDBOX DURATION",
		Short: "Change how long a sandbox may run",
		Long: `Limit a sandbox's run to DURATION from now, such as 90s, 10m or 2h. 0 takes the
limit away.`,
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: completeFirst(completeSandboxes("")),
		RunE: func(cmd *cobra.Command, a []string) error {
			d, err := time.ParseDuration(a[1])
			if err != nil {
				return usagef("DURATION %q: want a number with a unit, such as 90s, 10m or 2h", a[1])
			}
			if _, err := wholeSeconds("DURATION", d); err != nil {
				return err
			}
			c, err := connect()
			if err != nil {
				return err
			}
			sb, err := c.SetTimeout(cmd.Context(), a[0], d)
			if err != nil {
				return err
			}
			return outputOf(cmd).sandbox(sb)
		},
	}
}
