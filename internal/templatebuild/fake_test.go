package templatebuild_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/store"
	"git.omukk.dev/wrenn/sandbox/internal/templatebuild"
)

// fake is Sandboxes without machines. A command is a line of bash; "fail TEXT"
// prints TEXT and exits with 3, "hang" runs until its sandbox is gone, "flood"
// prints more than a log holds, all others succeed.
type fake struct {
	mu        sync.Mutex
	next      int
	sandboxes map[string]*machine
	snapshots map[string]bool
	ran       []string
	layers    []string          // of images, that came whole
	files     map[string]string // what was written, by path
	failOn    string            // an operation that fails
	hung      chan struct{}     // closed when a hang began
	notReady  int               // ready commands that fail before one succeeds
}

type machine struct {
	control.Sandbox
	gone chan struct{}
}

func newFake() *fake {
	return &fake{sandboxes: map[string]*machine{}, snapshots: map[string]bool{"base": true}, files: map[string]string{}, hung: make(chan struct{})}
}

func (f *fake) enter(op string) error {
	if f.failOn == op {
		return errors.New(op + " broke")
	}
	return nil
}

func notFound(what string) error {
	return &control.Error{Code: control.CodeNotFound, Message: "there is no " + what}
}

func (f *fake) Create(_ context.Context, p control.CreateParams) (control.Sandbox, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.snapshots[p.Template] {
		return control.Sandbox{}, notFound("template " + p.Template)
	}
	f.next++
	m := &machine{control.Sandbox{ID: fmt.Sprint("sb", f.next), Metadata: p.Metadata}, make(chan struct{})}
	f.sandboxes[m.ID] = m
	return m.Sandbox, f.enter("create")
}

func (f *fake) Delete(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.sandboxes[id]
	if m == nil {
		return notFound(id)
	}
	close(m.gone)
	delete(f.sandboxes, id)
	return nil
}

func (f *fake) List(_ context.Context, filter control.SandboxFilter) (out []control.Sandbox, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.sandboxes {
		for k, v := range filter.Metadata {
			if m.Metadata[k] == v {
				out = append(out, m.Sandbox)
			}
		}
	}
	return out, nil
}

func (f *fake) Exec(_ context.Context, id string, r control.ExecRequest) (control.ExecResult, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.notReady--; f.notReady >= 0 {
		return control.ExecResult{ExitCode: 1}, nil
	}
	return control.ExecResult{}, f.enter("exec")
}

type command struct {
	events chan control.ExecEvent
	gone   chan struct{}
	// input, where not nil, is told of what is sent, and ends the command.
	input func(control.ExecInput)
}

func (c *command) Send(in control.ExecInput) error {
	if c.input != nil {
		c.input(in)
	}
	return nil
}
func (c *command) Close() {}
func (c *command) Recv() (control.ExecEvent, error) {
	select {
	case e, ok := <-c.events:
		if ok {
			return e, nil
		}
		return e, io.EOF
	case <-c.gone:
		return control.ExecEvent{}, errors.New("the sandbox is gone")
	}
}

func (f *fake) Start(_ context.Context, id string, r control.ExecRequest) (templatebuild.Command, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.sandboxes[id]
	if m == nil {
		return nil, notFound(id)
	}
	line := r.Args[len(r.Args)-1]
	if line == "unpack-layer" {
		return f.unpack(m, r), nil
	}
	f.ran = append(f.ran, strings.TrimPrefix(r.User+": "+line, ": "))
	c := &command{events: make(chan control.ExecEvent, 100000), gone: m.gone}
	say := func(text string) {
		c.events <- control.ExecEvent{Kind: control.EventStdout, Data: []byte(text)}
	}
	code := int32(0)
	switch word, rest, _ := strings.Cut(line, " "); word {
	case "hang":
		close(f.hung)
		return c, nil
	case "fail":
		say(rest + "\n")
		code = 3
	case "flood":
		for range 50000 {
			say(strings.Repeat("x", 100) + "\n")
		}
	case "loud":
		say(strings.Repeat("y", 1<<20))
	}
	c.events <- control.ExecEvent{Kind: control.EventExit, ExitCode: code}
	return c, f.enter("start")
}

// unpack takes a layer; one that begins with "bad" fails at once.
func (f *fake) unpack(m *machine, r control.ExecRequest) *command {
	c := &command{events: make(chan control.ExecEvent, 2), gone: m.gone}
	var layer bytes.Buffer
	over := false
	end := func(code int32) {
		over = true
		c.events <- control.ExecEvent{Kind: control.EventExit, ExitCode: code}
	}
	c.input = func(in control.ExecInput) {
		if over {
			return
		}
		layer.Write(in.Stdin)
		if bytes.HasPrefix(layer.Bytes(), []byte("bad")) {
			c.events <- control.ExecEvent{Kind: control.EventStderr, Data: []byte("it is bad\n")}
			end(1)
		}
		if in.CloseStdin && !over {
			f.mu.Lock()
			f.layers = append(f.layers, layer.String())
			f.mu.Unlock()
			end(0)
		}
	}
	return c
}

func (f *fake) Reboot(_ context.Context, id string, _ int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.sandboxes[id] == nil {
		return notFound(id)
	}
	f.ran = append(f.ran, "(reboot)")
	return f.enter("reboot")
}

func (f *fake) ReadFile(context.Context, string, control.FileRef) (control.FileEntry, io.ReadCloser, error) {
	return control.FileEntry{}, nil, notFound("file")
}

func (f *fake) WriteFile(_ context.Context, id string, ref control.FileRef, _ uint32, r io.Reader) (control.FileEntry, error) {
	text, err := io.ReadAll(r)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.files[ref.Path] = string(text)
	return control.FileEntry{}, errors.Join(err, f.enter("write"))
}

func (f *fake) CreateSnapshot(_ context.Context, id, name string) (control.Template, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.snapshots[name] = true // also when the answer is lost
	return control.Template{}, f.enter("snapshot")
}

func (f *fake) GetSnapshot(_ context.Context, name string) (control.Template, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.snapshots[name] {
		return control.Template{}, notFound(name)
	}
	return control.Template{Name: name}, nil
}

func (f *fake) DeleteSnapshot(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.snapshots[name] {
		return notFound(name)
	}
	delete(f.snapshots, name)
	return nil
}

// left counts what a build has made and not removed.
func (f *fake) left() (sandboxes, snapshots int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.sandboxes), len(f.snapshots) - 1
}

func open(t *testing.T, f *fake) (*templatebuild.Builder, *store.DB) {
	t.Helper()
	db, err := store.Open(t.Context(), t.TempDir()+"/db")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return reopen(t, f, db), db
}

func reopen(t *testing.T, f *fake, db *store.DB) *templatebuild.Builder {
	t.Helper()
	b, err := templatebuild.New(t.Context(), templatebuild.Options{Store: db, Sandboxes: f, Dir: t.TempDir(), ReadyEvery: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// build requests and starts a build and waits for its end.
func build(t *testing.T, b *templatebuild.Builder, name string, tags []string, s templatebuild.Spec) templatebuild.Build {
	t.Helper()
	x, err := b.Request(t.Context(), name, tags, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Start(t.Context(), x.Template, x.ID, s); err != nil {
		t.Fatal(err)
	}
	return wait(t, b, x)
}

func wait(t *testing.T, b *templatebuild.Builder, x templatebuild.Build) templatebuild.Build {
	t.Helper()
	if err := b.Wait(t.Context(), x.ID); err != nil {
		t.Fatal(err)
	}
	x, _, err := b.Status(t.Context(), x.Template, x.ID, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func run(lines ...string) (s templatebuild.Spec) {
	for _, l := range lines {
		s.Steps = append(s.Steps, templatebuild.Step{Type: "RUN", Args: []string{l}})
	}
	return s
}

func text(entries []templatebuild.Entry) string {
	var b bytes.Buffer
	for _, e := range entries {
		fmt.Fprintf(&b, "%s %s %s\n", e.Step, e.Level, e.Message)
	}
	return b.String()
}
