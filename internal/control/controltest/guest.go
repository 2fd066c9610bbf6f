package controltest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"sort"
	"strconv"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// The commands of the fake guest: "echo ARGS…", "cat" (input to output until it
// ends), "exit N", "fail TEXT" (TEXT to stderr, exit 1), "bytes" (output that is
// not UTF-8), "sleep" (until stopped). Anything else exits with 127.

// Exec implements control.Host.
func (h *Host) Exec(ctx context.Context, id string, r control.ExecRequest) (control.ExecResult, error) {
	if err := h.enter("exec"); err != nil {
		return control.ExecResult{}, err
	}
	st, err := h.start(id, r)
	if err != nil {
		return control.ExecResult{}, err
	}
	defer st.Close()
	if len(r.Stdin) > 0 {
		_ = st.Send(control.ExecInput{Stdin: r.Stdin})
	}
	_ = st.Send(control.ExecInput{CloseStdin: true})
	res := control.ExecResult{Duration: time.Millisecond}
	for {
		e, err := st.recv(ctx)
		if err != nil {
			return res, err
		}
		switch e.Kind {
		case control.EventStdout:
			res.Stdout = append(res.Stdout, e.Data...)
		case control.EventStderr:
			res.Stderr = append(res.Stderr, e.Data...)
		case control.EventExit:
			res.ExitCode = e.ExitCode
			return res, nil
		}
	}
}

// ExecStream implements control.Host.
func (h *Host) ExecStream(_ context.Context, id string, r control.ExecRequest) (control.ExecStream, error) {
	if err := h.enter("exec"); err != nil {
		return nil, err
	}
	return h.start(id, r)
}

// onePID is the number of every process here.
const onePID = 42

type process struct {
	over   <-chan struct{} // the machine's run has ended
	in     chan control.ExecInput
	out    chan control.ExecEvent
	closed chan struct{}
	done   chan struct{} // the command has ended
	pty    bool
}

func (h *Host) start(id string, r control.ExecRequest) (*process, error) {
	s, err := h.live(id)
	if err != nil {
		return nil, err
	}
	if r.AttachPID != 0 {
		if r.AttachPID != onePID {
			return nil, Err(control.CodeNotFound, "there is no process %d", r.AttachPID)
		}
		r.Cmd = "cat" // it runs, and says back what it is told
	}
	h.mu.Lock()
	over := s.over
	h.mu.Unlock()
	p := &process{
		over: over, in: make(chan control.ExecInput), out: make(chan control.ExecEvent, 16),
		closed: make(chan struct{}), done: make(chan struct{}), pty: r.Pty != nil,
	}
	go p.run(r)
	return p, nil
}

// emit passes an event on; output is dropped once nobody listens.
func (p *process) emit(e control.ExecEvent) {
	if p.pty && (e.Kind == control.EventStdout || e.Kind == control.EventStderr) {
		e.Kind = control.EventPty
	}
	select {
	case p.out <- e:
	case <-p.closed:
	}
}

func (p *process) run(r control.ExecRequest) {
	defer close(p.out)
	defer close(p.done)
	p.emit(control.ExecEvent{Kind: control.EventStart, PID: onePID})
	exit := control.ExecEvent{Kind: control.EventExit}
	out := func(b []byte) { p.emit(control.ExecEvent{Kind: control.EventStdout, Data: b}) }
	switch {
	case r.Cmd == "echo":
		out([]byte(strings.Join(r.Args, " ") + "\n"))
	case r.Cmd == "bytes":
		out([]byte{0xff, 0, 0xfe})
	case r.Cmd == "fail":
		p.emit(control.ExecEvent{Kind: control.EventStderr, Data: []byte(strings.Join(r.Args, " "))})
		exit.ExitCode = 1
	case r.Cmd == "exit" && len(r.Args) == 1:
		n, _ := strconv.ParseInt(r.Args[0], 10, 32)
		exit.ExitCode = int32(n)
	case r.Cmd == "cat", r.Cmd == "sleep", r.Cmd == "/bin/bash":
		if !p.interact(r.Cmd != "sleep", &exit) {
			return
		}
	default:
		exit.ExitCode = 127
	}
	p.emit(exit)
}

// interact takes input until it ends, or the machine does (false).
func (p *process) interact(echo bool, exit *control.ExecEvent) bool {
	for {
		select {
		case <-p.over:
			return false
		case <-p.closed:
			return false
		case in := <-p.in:
			switch {
			case in.Stop:
				exit.ExitCode, exit.Reason = 143, "signal: terminated"
				return true
			case in.CloseStdin && echo:
				return true
			case in.Resize != nil:
				p.emit(control.ExecEvent{Kind: control.EventStdout, Data: fmt.Appendf(nil, "%dx%d", in.Resize.Cols, in.Resize.Rows)})
			case echo && len(in.Stdin) > 0:
				p.emit(control.ExecEvent{Kind: control.EventStdout, Data: bytes.Clone(in.Stdin)})
			}
		}
	}
}

func (p *process) Send(in control.ExecInput) error {
	select {
	case p.in <- in:
		return nil
	case <-p.over:
		return io.EOF
	case <-p.closed:
		return io.EOF
	case <-p.done:
		return io.EOF
	}
}

func (p *process) Recv() (control.ExecEvent, error) { return p.recv(context.Background()) }

func (p *process) recv(ctx context.Context) (control.ExecEvent, error) {
	select {
	case e, ok := <-p.out:
		if ok {
			return e, nil
		}
	case <-ctx.Done():
		return control.ExecEvent{}, ctx.Err()
	}
	select {
	case <-p.over:
		return control.ExecEvent{}, errors.New("the guest agent ended the stream")
	default:
		return control.ExecEvent{}, io.EOF
	}
}

func (p *process) Close() error {
	close(p.closed)
	return nil
}

func entry(name string, size int, mode uint32) control.FileEntry {
	return control.FileEntry{
		Name: path.Base(name), Path: name, Type: "file", Size: uint64(size), Mode: mode,
		Owner: "user", Group: "user", ModifiedAt: time.Unix(1e9, 0),
	}
}

// ReadFile implements control.Host.
func (h *Host) ReadFile(_ context.Context, id string, f control.FileRef) (control.FileEntry, io.ReadCloser, error) {
	if err := h.enter("read"); err != nil {
		return control.FileEntry{}, nil, err
	}
	s, err := h.live(id)
	if err != nil {
		return control.FileEntry{}, nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	b, ok := s.files[f.Path]
	if !ok {
		return control.FileEntry{}, nil, Err(control.CodeNotFound, "path: there is no file %s", f.Path)
	}
	return entry(f.Path, len(b), s.modes[f.Path]), io.NopCloser(bytes.NewReader(b)), nil
}

// WriteFile implements control.Host.
func (h *Host) WriteFile(_ context.Context, id string, f control.FileRef, mode uint32, r io.Reader) (control.FileEntry, error) {
	if err := h.enter("write"); err != nil {
		return control.FileEntry{}, err
	}
	s, err := h.live(id)
	if err != nil {
		return control.FileEntry{}, err
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return control.FileEntry{}, fmt.Errorf("read content: %w", err)
	}
	if mode == 0 {
		mode = 0o644
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s.files[f.Path], s.modes[f.Path] = b, mode
	return entry(f.Path, len(b), mode), nil
}

// ListFiles implements control.Host.
func (h *Host) ListFiles(_ context.Context, id string, f control.FileRef, _ uint32) ([]control.FileEntry, error) {
	if err := h.enter("list_files"); err != nil {
		return nil, err
	}
	s, err := h.live(id)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []control.FileEntry
	for name, b := range s.files {
		if strings.HasPrefix(name, strings.TrimSuffix(f.Path, "/")+"/") {
			out = append(out, entry(name, len(b), s.modes[name]))
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Path < out[j].Path })
	return out, nil
}

// MakeDir implements control.Host.
func (h *Host) MakeDir(_ context.Context, id string, f control.FileRef) (control.FileEntry, error) {
	if err := h.enter("mkdir"); err != nil {
		return control.FileEntry{}, err
	}
	_, err := h.live(id)
	e := entry(f.Path, 0, 0o755)
	e.Type = "dir"
	return e, err
}

// RemoveFile implements control.Host.
func (h *Host) RemoveFile(_ context.Context, id string, f control.FileRef) error {
	if err := h.enter("remove"); err != nil {
		return err
	}
	s, err := h.live(id)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := s.files[f.Path]; !ok {
		return Err(control.CodeNotFound, "path: there is no file %s", f.Path)
	}
	delete(s.files, f.Path)
	return nil
}
