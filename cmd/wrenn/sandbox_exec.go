package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/client"
)

// maxJSONStdin bounds the input of exec --json, which goes in one request.
const maxJSONStdin = 512 << 10

// execFlags are those that exec and shell share.
type execFlags struct {
	envs      []string
	cwd, user string
}

func (f *execFlags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	// What stands after SANDBOX belongs to the remote command.
	fs.SetInterspersed(false)
	fs.StringArrayVarP(&f.envs, "env", "e", nil, "KEY=VALUE for the command; may be repeated")
	fs.StringVarP(&f.cwd, "cwd", "w", "", "directory to run it in (default: the user's home)")
	fs.StringVarP(&f.user, "user", "u", "", "user to run it as (default: the template's)")
}

func (f *execFlags) request(command []string) (client.ExecRequest, error) {
	envs, err := parsePairs("--env", f.envs)
	if err != nil {
		return client.ExecRequest{}, err
	}
	req := client.ExecRequest{Envs: envs, Cwd: f.cwd, User: f.user}
	if len(command) > 0 && command[0] == "--" {
		command = command[1:]
	}
	if len(command) > 0 {
		req.Cmd, req.Args = command[0], command[1:]
	}
	return req, nil
}

func newSandboxExecCmd() *cobra.Command {
	var f execFlags
	var timeout time.Duration
	var interactive, noStdin bool
	var attach int
	cmd := &cobra.Command{
		Use:   "exec [flags] SANDBOX [--] COMMAND [ARG...]",
		Short: "Run a command in a sandbox",
		Long: `Run a command in a sandbox, directly and without a shell; its output appears as
it comes. This program's standard input is sent when it is not a terminal, or
with -i; -n sends none.

Ctrl-C asks the command to stop (SIGTERM, then SIGKILL); a second Ctrl-C leaves
without waiting.

The exit code is the command's own. Where wrenn itself fails it is 125, with a
message that begins with "wrenn:" on standard error; 130 after a second Ctrl-C.

With --attach PID no command is started: the output of one that runs is picked
up again, whose connection broke or that went on while the server was restarted.

With --json the command runs to its end and the result is printed as one object
{stdout, stderr, exit_code, duration_ms, encoding}; input is sent only with -i.`,
		Example: `  wrenn sandbox exec 7h2k9c uname -a
  wrenn sandbox exec 7h2k9c -- bash -c 'ls | wc -l'
  tar c src | wrenn sandbox exec -w /work 7h2k9c tar x`,
		Args: args(func(cmd *cobra.Command, a []string) error {
			if cmd.Flags().Changed("attach") {
				return cobra.ExactArgs(1)(cmd, a)
			}
			return cobra.MinimumNArgs(2)(cmd, a)
		}),
		ValidArgsFunction: completeFirst(completeSandboxes(client.StatusRunning)),
		Annotations:       map[string]string{passThrough: "yes"},
		RunE: func(cmd *cobra.Command, a []string) error {
			if cmd.Flags().Changed("attach") {
				return execAttach(cmd, a[0], attach)
			}
			req, err := f.request(a[1:])
			if err != nil {
				return err
			}
			if req.Cmd == "" {
				return usagef("no COMMAND after SANDBOX")
			}
			if req.TimeoutSec, err = wholeSeconds("--timeout", timeout); err != nil {
				return err
			}
			c, err := connect()
			if err != nil {
				return err
			}
			stdin := cmd.InOrStdin()
			if outputOf(cmd).json {
				return execJSON(cmd, c, a[0], req, interactive)
			}
			if noStdin || (!interactive && isTerminal(stdin)) {
				stdin = nil
			}
			return execStream(cmd, c, a[0], req, stdin)
		},
	}
	f.add(cmd)
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "end the command after this time (default: the server's limit)")
	cmd.Flags().BoolVarP(&interactive, "interactive", "i", false, "send standard input even from a terminal")
	cmd.Flags().BoolVarP(&noStdin, "no-stdin", "n", false, "send no standard input")
	cmd.Flags().IntVar(&attach, "attach", 0, "start nothing; pick up the output of the running command with this PID")
	cmd.MarkFlagsMutuallyExclusive("interactive", "no-stdin")
	return cmd
}

// execJSON runs the command to its end and prints the API's answer.
func execJSON(cmd *cobra.Command, c *client.Client, id string, req client.ExecRequest, stdin bool) error {
	if stdin {
		var err error
		if req.Stdin, err = io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxJSONStdin+1)); err != nil {
			return fmt.Errorf("reading standard input: %w", err)
		}
		if len(req.Stdin) > maxJSONStdin {
			return usagef("--json takes at most %d bytes of input; leave --json out", maxJSONStdin)
		}
	}
	res, err := c.Exec(cmd.Context(), id, req)
	if err != nil {
		return err
	}
	if err := outputOf(cmd).printJSON(res); err != nil {
		return err
	}
	return exitWith(res.ExitCode)
}

// execStream runs the command with its input and output passed along; a nil
// stdin is an empty one.
func execStream(cmd *cobra.Command, c *client.Client, id string, req client.ExecRequest, stdin io.Reader) error {
	ctx, cancel := context.WithCancelCause(cmd.Context())
	defer cancel(nil)
	s, err := c.ExecStream(ctx, id, req)
	if err != nil {
		return err
	}
	return follow(ctx, cancel, cmd, s, func() error {
		if stdin == nil {
			return s.CloseStdin()
		}
		go pump(s, stdin)
		return nil
	})
}

// execAttach goes on with a command that runs; its input is left as it is.
func execAttach(cmd *cobra.Command, id string, pid int) error {
	if pid < 1 {
		return usagef("--attach %d: want the PID of a command that runs", pid)
	}
	c, err := connect()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(cmd.Context())
	defer cancel(nil)
	s, err := c.AttachStream(ctx, id, pid)
	if err != nil {
		return err
	}
	return follow(ctx, cancel, cmd, s, func() error { return nil })
}

// follow prints what a command says until it ends.
func follow(ctx context.Context, cancel context.CancelCauseFunc, cmd *cobra.Command, s *client.Stream, input func() error) error {
	defer s.Close()
	defer onInterrupts(func(n int) {
		if n > 1 {
			cancel(errInterrupted)
			return
		}
		fmt.Fprintln(cmd.ErrOrStderr(), "wrenn: stopping the command; Ctrl-C again to leave it")
		// Not waited for: a connection that hangs must not keep the second
		// Ctrl-C from being seen. Ends with ctx.
		go func() { _ = s.Stop() }()
	})()
	if err := input(); err != nil {
		return err
	}
	code, err := s.Copy(cmd.OutOrStdout(), cmd.ErrOrStderr())
	if err != nil {
		if errors.Is(context.Cause(ctx), errInterrupted) {
			return errInterrupted
		}
		return err
	}
	return exitWith(code)
}

// pump sends input until it ends or the stream does. A read from a terminal
// cannot be cancelled, so this goroutine may wait in one until the process
// exits, which is right after the stream's end. Its errors are dropped: those
// of the stream come up in receiving, and a broken input is an ended one.
func pump(s *client.Stream, stdin io.Reader) {
	_, _ = io.Copy(s, stdin)
	_ = s.CloseStdin()
}

// onInterrupts calls f with 1, 2, … for every SIGINT or SIGTERM until the
// returned function is called.
func onInterrupts(f func(n int)) (stop func()) {
	ch := make(chan os.Signal, 4)
	signal.Notify(ch, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		for n := 1; ; n++ {
			select {
			case <-ch:
				f(n)
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(ch)
		close(done)
	}
}

func exitWith(code int) error {
	if code == 0 {
		return nil
	}
	return remoteExit(code)
}

func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
