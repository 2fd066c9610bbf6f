package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/client"
)

func newSandboxShellCmd() *cobra.Command {
	var f execFlags
	cmd := &cobra.Command{
		Use:   "shell [flags] SANDBOX [--] [COMMAND [ARG...]]",
		Short: "Open a terminal in a sandbox",
		Long: `Open a terminal in a sandbox with a login shell, or COMMAND. The local terminal
is put into raw mode, follows changes of size, and is put back at the end.

The exit code is the shell's own. Where wrenn itself fails it is 125, with a
message that begins with "wrenn:" on standard error.`,
		Example: `  wrenn sandbox shell 7h2k9c
  wrenn sandbox shell -u root 7h2k9c top`,
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeFirst(completeSandboxes(client.StatusRunning)),
		Annotations:       map[string]string{passThrough: "yes"},
		RunE: func(cmd *cobra.Command, a []string) error {
			tty, ok := cmd.InOrStdin().(*os.File)
			if !ok || !term.IsTerminal(int(tty.Fd())) {
				return usagef("standard input is not a terminal; use wrenn sandbox exec")
			}
			req, err := f.request(a[1:])
			if err != nil {
				return err
			}
			if req.Cmd == "" {
				req.Cmd, req.Args = "/bin/bash", []string{"-l"}
			}
			if _, set := req.Envs["TERM"]; !set {
				if req.Envs == nil {
					req.Envs = map[string]string{}
				}
				req.Envs["TERM"] = cmp.Or(os.Getenv("TERM"), "xterm-256color")
			}
			c, err := connect()
			if err != nil {
				return err
			}
			return shell(cmd, c, a[0], req, tty)
		},
	}
	f.add(cmd)
	return cmd
}

// shell connects the local terminal with one in the sandbox. Whatever way it
// returns, the local terminal is as it was before.
func shell(cmd *cobra.Command, c *client.Client, id string, req client.ExecRequest, tty *os.File) (err error) {
	ctx, cancel := context.WithCancelCause(cmd.Context())
	defer cancel(nil)
	size := terminalSize(tty)
	s, err := c.PTY(ctx, id, req, size)
	if err != nil {
		return err
	}
	defer s.Close()

	fd := int(tty.Fd())
	old, err := term.MakeRaw(fd)
	if err != nil {
		return fmt.Errorf("putting the terminal into raw mode: %w", err)
	}
	defer func() {
		if rerr := term.Restore(fd, old); rerr != nil {
			err = errors.Join(err, fmt.Errorf("restoring the terminal (type: stty sane): %w", rerr))
		}
	}()
	defer followTerminal(s, tty, size, cancel)()
	go pumpTerminal(s, tty, cancel)
	code, err := s.Copy(cmd.OutOrStdout(), cmd.ErrOrStderr())
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return err
	}
	return exitWith(code)
}

// pumpTerminal sends what is typed until the stream ends; a terminal that ends
// first (it was closed) ends the session. As in pump, a read may wait until the
// process exits.
func pumpTerminal(s *client.Stream, tty *os.File, cancel context.CancelCauseFunc) {
	buf := make([]byte, 4096)
	for {
		n, err := tty.Read(buf)
		if err != nil {
			cancel(fmt.Errorf("reading the terminal: %w", err))
			return
		}
		if _, err := s.Write(buf[:n]); err != nil {
			return // comes up in receiving
		}
	}
}

// followTerminal passes changes of size on, and ends the session on a signal
// that would otherwise end the process with the terminal still raw. (Ctrl-C
// does not raise one in raw mode: it goes to the sandbox.)
func followTerminal(s *client.Stream, tty *os.File, last client.PTYSize, cancel context.CancelCauseFunc) (stop func()) {
	ch := make(chan os.Signal, 4)
	signal.Notify(ch, syscall.SIGWINCH, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	done := make(chan struct{})
	go func() {
		for {
			// First without a signal: the size may have changed before Notify.
			if size := terminalSize(tty); size != last {
				last = size
				_ = s.Resize(size) // a broken stream comes up in receiving
			}
			select {
			case sig := <-ch:
				if sig != syscall.SIGWINCH {
					cancel(errInterrupted)
					return
				}
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

// terminalSize falls back to 80x24 for terminals that do not know theirs
// (serial lines say 0x0).
func terminalSize(tty *os.File) client.PTYSize {
	cols, rows, err := term.GetSize(int(tty.Fd()))
	if err != nil || cols < 1 || rows < 1 {
		return client.PTYSize{Cols: 80, Rows: 24}
	}
	return client.PTYSize{Cols: cols, Rows: rows}
}
