package main

import (
	"encoding/json"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
)

// killAfterEnv is for tests alone. It names a file; the server kills itself,
// as kill -9 does, when it has done the step that is written there, in the form
// pause/commit. `wrenn steps` lists them.
const killAfterEnv = "WRENN_TEST_KILL_AFTER"

// newStepsCmd prints what the tests crash after.
func newStepsCmd() *cobra.Command {
	var own bool
	cmd := &cobra.Command{
		Use: "steps", Short: "List the steps of every operation, as JSON (for tests)", Hidden: true,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return json.NewEncoder(cmd.OutOrStdout()).Encode(engine.Steps(own))
		},
	}
	cmd.Flags().BoolVar(&own, "own-memory", false, "with a driver that keeps guest memory to itself")
	return cmd
}

// killAfter returns what ends this process after a step, nil without the
// variable.
func killAfter() func(engine.Op, string) error {
	path := os.Getenv(killAfterEnv)
	if path == "" {
		return nil
	}
	return func(op engine.Op, step string) error {
		b, err := os.ReadFile(path)
		if err != nil || strings.TrimSpace(string(b)) != string(op)+"/"+step {
			return nil // no file: not now
		}
		if err := unix.Kill(os.Getpid(), unix.SIGKILL); err != nil {
			return err
		}
		select {} // it ends at any moment
	}
}
