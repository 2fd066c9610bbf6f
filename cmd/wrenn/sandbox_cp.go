package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/client"
)

func newSandboxCpCmd() *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use:   "cp [flags] SOURCE DESTINATION",
		Short: "Copy files to or from a sandbox",
		Long: `Copy a file or a directory with all it holds. One side is SANDBOX:PATH, the other
a local path or "-" for standard input or output. A local name that looks like
SANDBOX:PATH is written ./NAME.

A destination that is a directory, or ends in "/", gets the source under its own
name; otherwise the destination is the copy's name. A source directory that ends
in "/." copies what it holds. Permission bits are kept, owners and times are
not. Links are followed to files; links to directories, and what is no file, are
named on standard error and left out.

A file appears whole or not at all, unless the local destination is a device or
a pipe.`,
		Example: `  wrenn sandbox cp data.csv 7h2k9c:/work/
  wrenn sandbox cp 7h2k9c:/work/out ./results
  wrenn sandbox cp 7h2k9c:/var/log/syslog - | less`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			src, dst := parsePlace(a[0]), parsePlace(a[1])
			if err := checkPlaces(src, dst); err != nil {
				return err
			}
			c, err := connect()
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop) // a second Ctrl-C ends the process at once
			cp := &copier{ctx: ctx, c: c, user: user, in: cmd.InOrStdin(), out: cmd.OutOrStdout(), warn: cmd.ErrOrStderr()}
			cp.bar = newBar(cmd)
			if dst.sandbox != "" {
				cp.id = dst.sandbox
				err = cp.upload(src.path, dst.path)
			} else {
				cp.id = src.sandbox
				err = cp.download(src.path, dst.path)
			}
			cp.bar.finish()
			if err != nil && ctx.Err() != nil && cmd.Context().Err() == nil {
				return errInterrupted
			}
			return err
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "user to read or write as in the sandbox (default: the template's)")
	return cmd
}

// place is one side of a copy; a local one has no sandbox, and "-" is a stream.
type place struct{ sandbox, path string }

const stream = "-"

var placePattern = regexp.MustCompile(`^([a-z0-9]+):(.*)$`)

func parsePlace(s string) place {
	if m := placePattern.FindStringSubmatch(s); m != nil {
		return place{m[1], m[2]}
	}
	return place{path: s}
}

func checkPlaces(src, dst place) error {
	switch {
	case src.sandbox == "" && dst.sandbox == "":
		return usagef("neither %q nor %q is in a sandbox: write SANDBOX:PATH", src.path, dst.path)
	case src.sandbox != "" && dst.sandbox != "":
		return usagef("both are in sandboxes: copy through a pipe, wrenn sandbox cp A:PATH - | wrenn sandbox cp - B:PATH")
	case src.path == "" || dst.path == "":
		return usagef("a path is empty")
	}
	return nil
}

// copier copies between this machine and one sandbox.
type copier struct {
	ctx  context.Context
	c    *client.Client
	id   string
	user string
	in   io.Reader
	out  io.Writer
	warn io.Writer
	bar  *bar
}

// skip tells about something that is not copied.
func (cp *copier) skip(name, why string) {
	cp.bar.clear()
	fmt.Fprintf(cp.warn, "wrenn: left out %s: %s\n", printable(name), printable(why))
}

// remoteDir lists a path of the sandbox, and says whether it is a directory. A
// file, nothing at all, or no such sandbox are all no directory: the call that
// then reads or writes the path says which it was.
func (cp *copier) remoteDir(p string) ([]client.FileEntry, bool, error) {
	entries, err := cp.c.ListFiles(cp.ctx, cp.id, p, client.ListFilesOptions{User: cp.user})
	if err == nil {
		return entries, true, nil
	}
	if client.IsInvalidRequest(err) || client.IsConflict(err) || client.IsNotFound(err) {
		return nil, false, nil
	}
	return nil, false, err
}

// contents says that a source means what a directory holds, not itself.
func contents(p string) bool {
	last := p[strings.LastIndexByte(p, '/')+1:]
	return last == "." || last == ".." || path.Clean(p) == "/"
}

var errDirToStream = errors.New(`a directory cannot go to standard output; use wrenn sandbox exec SANDBOX tar c DIR`)

// bar shows progress on a terminal; nil shows nothing.
type bar struct{ b *progressbar.ProgressBar }

// newBar returns nil unless standard error is a terminal and --quiet is off.
func newBar(cmd *cobra.Command) *bar {
	w := cmd.ErrOrStderr()
	if !isTerminal(w) || outputOf(cmd).quiet {
		return nil
	}
	return &bar{progressbar.NewOptions64(-1,
		progressbar.OptionSetWriter(w),
		progressbar.OptionShowBytes(true),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionSetPredictTime(true),
		progressbar.OptionFullWidth(),
		progressbar.OptionOnCompletion(func() { fmt.Fprintln(w) }),
	)}
}

// total sets how many bytes will come; 0 or less means not known.
func (b *bar) total(n int64) {
	if b != nil && n > 0 {
		b.b.ChangeMax64(n)
	}
}

func (b *bar) name(s string) {
	if b != nil {
		b.b.Describe(printable(s))
	}
}

func (b *bar) clear() {
	if b != nil {
		_ = b.b.Clear()
	}
}

func (b *bar) finish() {
	if b != nil && !b.b.IsFinished() {
		_ = b.b.Exit()
	}
}

// reader counts what is read through it.
func (b *bar) reader(r io.Reader) io.Reader {
	if b == nil {
		return r
	}
	return io.TeeReader(r, b.b)
}
