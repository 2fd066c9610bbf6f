package templatebuild

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// DefaultsPath is where a template keeps Defaults; the guest agent reads it.
const DefaultsPath = "/etc/wrenn/template.json"

// Defaults are what a template gives to every process of its sandboxes.
type Defaults struct {
	Envs    map[string]string `json:"envs,omitempty"`
	User    string            `json:"user,omitempty"`
	Workdir string            `json:"workdir,omitempty"`
}

// worker does the steps of one build in its sandbox.
type worker struct {
	b        *Builder
	id       string
	template string
	log      *buildLog
	defaults Defaults
	copies   int
}

const maxDefaults = 1 << 20

func (w *worker) loadDefaults(ctx context.Context) error {
	_, r, err := w.b.opt.Sandboxes.ReadFile(ctx, w.id, control.FileRef{Path: DefaultsPath, User: "root"})
	if control.CodeOf(err) == control.CodeNotFound && err != nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the base's defaults: %w", err)
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, maxDefaults))
	if err != nil {
		return fmt.Errorf("read the base's defaults: %w", err)
	}
	if json.Unmarshal(text, &w.defaults) != nil {
		// The guest agent passes over it too.
		w.log.say("warn", "%s of the base cannot be read; it is written anew", DefaultsPath)
		w.defaults = Defaults{}
	}
	return nil
}

func (w *worker) saveDefaults(ctx context.Context) error {
	text, err := json.Marshal(w.defaults)
	if err != nil {
		return err
	}
	if len(text) > maxDefaults {
		return control.Invalid("ENV", "all variables together must have at most %d bytes", maxDefaults)
	}
	write := func(name string, text []byte) error {
		_, err := w.b.opt.Sandboxes.WriteFile(ctx, w.id, control.FileRef{Path: name, User: "root"}, 0o644, bytes.NewReader(text))
		return err
	}
	if err := write(DefaultsPath, text); err != nil {
		return fmt.Errorf("write the template's defaults: %w", err)
	}
	if p, ok := w.defaults.Envs["PATH"]; ok {
		// Login shells, which the SDKs use, set a PATH of their own.
		return write("/etc/profile.d/zz-wrenn-path.sh", []byte("export PATH="+quote(p)+"\n"))
	}
	return nil
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func (w *worker) user() string {
	if w.defaults.User != "" {
		return w.defaults.User
	}
	return "user"
}

// step does one step, which has been checked.
func (w *worker) step(ctx context.Context, s Step) error {
	w.log.say("info", "%s %s", s.Type, strings.Join(s.Args, " "))
	switch s.Type {
	case "RUN":
		user := ""
		if len(s.Args) > 1 {
			user = s.Args[1]
		}
		return w.shell(ctx, s.Args[0], user, nil)
	case "ENV":
		envs := maps.Clone(w.defaults.Envs)
		if envs == nil {
			envs = map[string]string{}
		}
		for i := 0; i < len(s.Args); i += 2 {
			envs[s.Args[i]] = s.Args[i+1]
		}
		w.defaults.Envs = envs
		return w.saveDefaults(ctx)
	case "USER":
		if err := w.shell(ctx, `getent passwd "$1" >/dev/null || { echo "there is no user $1; make it first with RUN useradd -m $1" >&2; exit 1; }`, "root", s.Args); err != nil {
			return err
		}
		w.defaults.User = s.Args[0]
		return w.saveDefaults(ctx)
	case "WORKDIR":
		dir := w.absolute(s.Args[0])
		if err := w.shell(ctx, makeDirs+`mk "$1"`, "root", []string{dir, w.user()}); err != nil {
			return err
		}
		w.defaults.Workdir = dir
		return w.saveDefaults(ctx)
	default: // COPY; check refuses all else
		return w.copy(ctx, s)
	}
}

// absolute is a path of the build's, from its working directory.
func (w *worker) absolute(p string) string {
	if path.IsAbs(p) {
		return path.Clean(p)
	}
	dir := w.defaults.Workdir
	if dir == "" {
		dir = "/home/" + w.user()
		if w.user() == "root" {
			dir = "/root"
		}
	}
	return path.Join(dir, p)
}

// makeDirs is a function for the shell: directories that are missing are made
// for the owner in $2; those that are there stay as they are.
const makeDirs = `set -e; mk() { [ -d "$1" ] || { mk2 "$(dirname -- "$1")"; mkdir -- "$1"; chown -- "$owner" "$1"; }; }; mk2() { mk "$1"; }; owner=$2; `

// shell runs a line of bash, with its output in the build's log. No args: as
// the SDKs run commands, in a login shell; with args: our own scripts.
func (w *worker) shell(ctx context.Context, line, user string, args []string) error {
	r := control.ExecRequest{Cmd: "/bin/bash", Args: []string{"-l", "-c", line}, User: user}
	if args != nil {
		r = control.ExecRequest{Cmd: "/bin/bash", Args: append([]string{"-c", line, "wrenn"}, args...), User: user, Cwd: "/"}
	}
	c, err := w.b.opt.Sandboxes.Start(ctx, w.id, r)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.Send(control.ExecInput{CloseStdin: true}) // one that has ended already is no failure
	ev, err := w.follow(c)
	if err != nil {
		return err
	}
	if ev.ExitCode == 0 {
		return nil
	}
	return w.exitError(ev)
}

// exitError is a command's failure, with the last that it printed.
func (w *worker) exitError(ev control.ExecEvent) error {
	var tail strings.Builder
	for _, e := range w.log.lastLines() {
		tail.WriteString("\n" + e.Message)
	}
	how := fmt.Sprintf("the command exited with %d", ev.ExitCode)
	if ev.Reason != "" {
		how = "the command ended: " + ev.Reason
	}
	return errors.New(how + tail.String())
}

// follow puts a command's output into the log until it ends.
func (w *worker) follow(c Command) (control.ExecEvent, error) {
	stdout, stderr := &lines{log: w.log, level: "info"}, &lines{log: w.log, level: "warn"}
	defer stderr.flush()
	defer stdout.flush()
	for {
		ev, err := c.Recv()
		if err != nil {
			return ev, fmt.Errorf("the command's end is not known: %w", err)
		}
		switch ev.Kind {
		case control.EventStdout:
			stdout.write(ev.Data)
		case control.EventStderr:
			stderr.write(ev.Data)
		case control.EventExit:
			stdout.flush()
			stderr.flush()
			return ev, nil
		}
	}
}

// startCommand is the template's own process.
type startCommand struct {
	c     Command
	ended chan struct{} // closed when its end, or the stream's, was seen
	err   error         // of a process that failed; after ended
}

// start starts it; its output goes into the log until it is left alone.
func (w *worker) start(ctx context.Context, line string) (*startCommand, error) {
	c, err := w.b.opt.Sandboxes.Start(ctx, w.id, control.ExecRequest{Cmd: "/bin/bash", Args: []string{"-l", "-c", line}})
	if err != nil {
		return nil, err
	}
	_ = c.Send(control.ExecInput{CloseStdin: true})
	s := &startCommand{c: c, ended: make(chan struct{})}
	go func() { // ends with the command or its sandbox, at the latest when the build's is removed
		defer close(s.ended)
		if ev, err := w.follow(c); err == nil && ev.ExitCode != 0 {
			s.err = fmt.Errorf("the start command failed: %w", w.exitError(ev))
		}
	}()
	return s, nil
}

// failure tells whether the process has failed by now. One that has ended well
// may have left a daemon.
func (s *startCommand) failure() error {
	if s == nil {
		return nil
	}
	select {
	case <-s.ended:
		return s.err
	default:
		return nil
	}
}

// leave lets go of the process, which goes on.
func (s *startCommand) leave() { s.c.Close() }

// waitReady tries the ready command until it succeeds.
func (w *worker) waitReady(ctx context.Context, line string, s *startCommand) error {
	tick := time.NewTicker(w.b.opt.ReadyEvery)
	defer tick.Stop()
	for {
		res, err := w.b.opt.Sandboxes.Exec(ctx, w.id, control.ExecRequest{
			Cmd: "/bin/bash", Args: []string{"-l", "-c", line}, TimeoutSec: 120,
		})
		if err != nil {
			return err
		}
		if res.ExitCode == 0 && !res.TimedOut {
			return nil
		}
		if err := s.failure(); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
