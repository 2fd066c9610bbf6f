package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

const rootLong = `Wrenn runs sandboxes: small virtual machines for code that you did not write.

A server (wrenn up) holds them; the other commands talk to it.

Environment:
  WRENN_URL      the server; default http://127.0.0.1:8000
  WRENN_API_KEY  the API key; default: the content of $WRENN_DIR/api-key
  WRENN_DIR      the server's state directory; default /var/lib/wrenn

Exit codes:
  0    done
  1    any other error
  2    wrong command line, or a value that the server refused as invalid
  3    the sandbox, snapshot, template or file does not exist
  4    conflict, or the sandbox is in the wrong state
  5    no API key, or one that the server does not know
  6    no server can be reached, its host cannot take the work now, or the API
       key asks too fast
  125  sandbox exec and shell only: wrenn itself failed, for any reason above
       (all other codes of these two are the remote command's own)
  130  interrupted by Ctrl-C`

// newRootCmd puts all commands together.
func newRootCmd() *cobra.Command {
	root := groupCmd("wrenn", "Run, pause, resume and clone sandboxes")
	root.Long = rootLong
	root.SilenceErrors = true // finish prints them
	root.SilenceUsage = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(
		newSandboxCmd(), newSnapshotCmd(), newTemplateCmd(), newVersionCmd(),
		newUpCmd(), newCACmd(), newPagerCmd(), newDoctorCmd(), newStoreCmd(), newMCPCmd(), newStepsCmd(),
	)
	return root
}

// groupCmd is a command that only holds others. Without RunE cobra would
// answer a misspelt subcommand with the help text and exit code 0.
func groupCmd(use, short string) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			msg := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				msg += "; did you mean " + strings.Join(s, " or ") + "?"
			}
			return usagef("%s", msg)
		},
	}
}

// args makes a cobra argument check report a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, a []string) error {
		if err := check(cmd, a); err != nil {
			return usagef("%w; usage: %s", err, cmd.UseLine())
		}
		return nil
	}
}
