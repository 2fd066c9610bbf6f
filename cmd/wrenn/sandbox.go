package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/client"
)

func newSandboxCmd() *cobra.Command {
	cmd := groupCmd("sandbox", "Create sandboxes and work in them")
	cmd.Aliases = []string{"sb"}
	addOutputFlags(cmd)
	cmd.AddCommand(
		newSandboxCreateCmd(), newSandboxListCmd(), newSandboxGetCmd(), newSandboxRmCmd(),
		newSandboxExecCmd(), newSandboxShellCmd(), newSandboxCpCmd(),
		newSandboxPauseCmd(), newSandboxResumeCmd(), newSandboxForkCmd(), newSandboxTimeoutCmd(), newSandboxEventsCmd(),
	)
	return cmd
}

func newSandboxCreateCmd() *cobra.Command {
	var req client.CreateSandboxRequest
	var timeout time.Duration
	var metadata, envs []string
	cmd := &cobra.Command{
		Use:   "create [TEMPLATE]",
		Short: "Create a sandbox from a template (default: base)",
		Long: `Create a sandbox from a base template or a snapshot, and wait until it runs.

A snapshot fixes the number of vCPUs and the memory: leave --vcpus and --memory
out, or give the same values.`,
		Example: `  wrenn sandbox create
  wrenn sandbox create warm-python --timeout 10m --auto-pause -m owner=ann
  id=$(wrenn sandbox create -q)`,
		Args:              args(cobra.MaximumNArgs(1)),
		ValidArgsFunction: completeFirst(completeTemplates("")),
		RunE: func(cmd *cobra.Command, a []string) (err error) {
			req.Template = "base"
			if len(a) == 1 {
				req.Template = a[0]
			}
			if req.Metadata, err = parsePairs("--metadata", metadata); err != nil {
				return err
			}
			if req.Envs, err = parsePairs("--env", envs); err != nil {
				return err
			}
			if req.TimeoutSec, err = wholeSeconds("--timeout", timeout); err != nil {
				return err
			}
			c, err := connect()
			if err != nil {
				return err
			}
			sb, err := c.CreateSandbox(cmd.Context(), req)
			if err != nil {
				return err
			}
			return outputOf(cmd).sandbox(sb)
		},
	}
	f := cmd.Flags()
	f.IntVar(&req.VCPUs, "vcpus", 0, "number of vCPUs (default: the template's)")
	f.IntVar(&req.MemoryMB, "memory", 0, "memory in MiB (default: the template's)")
	f.DurationVar(&timeout, "timeout", 0, "end the run after this time, such as 90s or 2h (default: no limit)")
	f.BoolVar(&req.AutoPause, "auto-pause", false, "at the time limit pause, do not destroy")
	f.StringArrayVarP(&metadata, "metadata", "m", nil, "KEY=VALUE to find it by; may be repeated")
	f.StringArrayVarP(&envs, "env", "e", nil, "KEY=VALUE in the environment of every process; may be repeated")
	return cmd
}

func newSandboxListCmd() *cobra.Command {
	var o client.ListSandboxesOptions
	var metadata []string
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List sandboxes",
		Example: `  wrenn sandbox list --status running -m owner=ann
  wrenn sandbox rm $(wrenn sandbox list -q --status error)`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.Metadata, err = parsePairs("--metadata", metadata); err != nil {
				return err
			}
			c, err := connect()
			if err != nil {
				return err
			}
			var list []client.Sandbox
			for sb, err := range c.Sandboxes(cmd.Context(), o) {
				if err != nil {
					return err
				}
				list = append(list, sb)
			}
			return outputOf(cmd).sandboxes(list)
		},
	}
	cmd.Flags().StringSliceVar(&o.Status, "status", nil, "only these states, such as running,paused")
	cmd.Flags().StringArrayVarP(&metadata, "metadata", "m", nil, "only with this KEY=VALUE; may be repeated")
	_ = cmd.RegisterFlagCompletionFunc("status", cobra.FixedCompletions([]cobra.Completion{
		client.StatusPending, client.StatusRunning, client.StatusPausing, client.StatusPaused,
		client.StatusResuming, client.StatusStopping, client.StatusStopped, client.StatusError,
	}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func newSandboxGetCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "get SANDBOX",
		Short:             "Show a sandbox",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeFirst(completeSandboxes("")),
		RunE: func(cmd *cobra.Command, a []string) error {
			c, err := connect()
			if err != nil {
				return err
			}
			sb, err := c.GetSandbox(cmd.Context(), a[0])
			if err != nil {
				return err
			}
			return outputOf(cmd).sandbox(sb)
		},
	}
}

func newSandboxRmCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "rm SANDBOX...",
		Aliases:           []string{"delete"},
		Short:             "Destroy sandboxes, in any state, with all they hold",
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeSandboxes(""),
		RunE: func(cmd *cobra.Command, a []string) error {
			c, err := connect()
			if err != nil {
				return err
			}
			return removeEach(cmd, a, force, c.DeleteSandbox)
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not complain about those that do not exist")
	return cmd
}

// removeEach deletes every name, prints those that are gone, and reports all
// failures at the end: one that fails does not keep the rest.
func removeEach(cmd *cobra.Command, names []string, force bool, remove func(context.Context, string) error) error {
	o := outputOf(cmd)
	var errs []error
	gone := []string{}
	for _, n := range names {
		err := remove(cmd.Context(), n)
		switch {
		case err == nil:
			gone = append(gone, n)
			if !o.json {
				err = o.lines([]string{n})
			}
		case force && client.IsNotFound(err):
			err = nil
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", n, err))
			if client.IsUnreachable(err) || client.IsUnauthorized(err) {
				break // the others would fail alike
			}
		}
	}
	if o.json {
		errs = append(errs, o.printJSON(map[string][]string{"deleted": gone}))
	}
	return errors.Join(errs...)
}

// parsePairs reads KEY=VALUE arguments.
func parsePairs(flag string, pairs []string) (map[string]string, error) {
	if len(pairs) == 0 {
		return nil, nil
	}
	m := make(map[string]string, len(pairs))
	for _, p := range pairs {
		k, v, ok := strings.Cut(p, "=")
		if !ok || k == "" {
			return nil, usagef("%s %q: want KEY=VALUE", flag, p)
		}
		if _, dup := m[k]; dup {
			return nil, usagef("%s: %q is given twice", flag, k)
		}
		m[k] = v
	}
	return m, nil
}

func wholeSeconds(what string, d time.Duration) (int, error) {
	if d < 0 || d%time.Second != 0 {
		return 0, usagef("%s %v: want whole seconds, not negative", what, d)
	}
	return int(d / time.Second), nil
}
