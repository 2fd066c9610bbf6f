package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// execGrace is what the host gets beyond a command's own limit to end it and
// answer.
const execGrace = 30 * time.Second

// use begins an activity in a running sandbox; the caller must call end, which
// moves last_active_at whatever has become of the caller's context.
func (s *Service) use(ctx context.Context, id, op string) (end func(), err error) {
	sb, err := s.row(ctx, id)
	if err != nil {
		return nil, err
	}
	if sb.Status != StatusRunning {
		return nil, wrongState(sb, op, string(StatusRunning))
	}
	// While it lasts, seen gives the present time; no write is needed.
	s.active.add(id, 1)
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := s.store.TouchSandbox(ctx, id, s.now()); err != nil {
			s.log.WarnContext(ctx, "write last_active_at", "sandbox", id, "err", err)
		}
		s.active.add(id, -1)
	}, nil
}

// CheckRunning tells whether a sandbox takes commands now, without starting
// one: what a stream wants to know before it is upgraded.
func (s *Service) CheckRunning(ctx context.Context, id, op string) error {
	sb, err := s.row(ctx, id)
	if err == nil && sb.Status != StatusRunning {
		err = wrongState(sb, op, string(StatusRunning))
	}
	return err
}

func execContext(ctx context.Context, sec int64) (context.Context, context.CancelFunc) {
	if sec == 0 {
		sec = MaxExecSec
	}
	return context.WithTimeout(context.WithoutCancel(ctx), time.Duration(sec)*time.Second+execGrace)
}

// Exec runs a command to its end, also when the caller has gone.
func (s *Service) Exec(ctx context.Context, id string, r ExecRequest) (_ ExecResult, err error) {
	if err := r.validate(); err != nil {
		return ExecResult{}, err
	}
	end, err := s.use(ctx, id, "exec")
	if err != nil {
		return ExecResult{}, err
	}
	defer end()
	defer s.observe("exec")(&err)
	ctx, cancel := execContext(ctx, r.TimeoutSec)
	defer cancel()
	res, err := s.host.Exec(ctx, id, r)
	if err != nil {
		return res, s.lost(ctx, id, fmt.Errorf("exec in %s: %w", id, err))
	}
	return res, nil
}

// lost passes on an error of a call into a sandbox. One that broke because the
// sandbox was paused or deleted meanwhile is the caller's to know, not a fault;
// one that the host does not agree about leads to a look at it.
func (s *Service) lost(ctx context.Context, id string, err error) error {
	code := CodeOf(err)
	switch code {
	case CodeNotFound, CodeInvalidState, CodeHostUnavailable:
		s.wake()
	}
	if code != CodeInternal && code != CodeHostUnavailable {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if sb, rowErr := s.store.GetSandbox(ctx, id); rowErr == nil && sb.Status != StatusRunning {
		return &Error{Code: CodeInvalidState, Err: err,
			Message: fmt.Sprintf("sandbox %s did not stay running: it is %s", id, sb.Status)}
	}
	return err
}

// Session is a running command of ExecStream. Close must be called; it does
// not stop the command.
type Session struct {
	stream ExecStream
	lost   func(error) error
	end    func()
	once   sync.Once
}

// ExecStream starts a command, on a terminal if r.Pty is set. The command does
// not end with ctx, nor with the Session: only by itself, by Stop, or at its
// limit.
func (s *Service) ExecStream(ctx context.Context, id string, r ExecRequest) (*Session, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	end, err := s.use(ctx, id, "exec")
	if err != nil {
		return nil, err
	}
	ctx, cancel := execContext(ctx, r.TimeoutSec)
	stream, err := s.host.ExecStream(ctx, id, r)
	if err != nil {
		cancel()
		end()
		return nil, s.lost(ctx, id, fmt.Errorf("exec in %s: %w", id, err))
	}
	return &Session{
		stream: stream,
		lost:   func(err error) error { return s.lost(ctx, id, err) },
		end:    func() { cancel(); end() },
	}, nil
}

// Send gives the command input. Not for two goroutines at once.
func (x *Session) Send(in ExecInput) error { return x.stream.Send(in) }

// Recv gives the next event; io.EOF after the last one.
func (x *Session) Recv() (ExecEvent, error) {
	ev, err := x.stream.Recv()
	if err != nil && !errors.Is(err, io.EOF) {
		err = x.lost(err)
	}
	return ev, err
}

// Drain waits for the command's end and drops its output: what is left to do
// when the client has gone, so that last_active_at moves when it ends.
func (x *Session) Drain() {
	for {
		if _, err := x.stream.Recv(); err != nil {
			return
		}
	}
}

// Close frees the session.
func (x *Session) Close() {
	x.once.Do(func() {
		_ = x.stream.Close() // The command's outcome is known or given up.
		x.end()
	})
}

// ReadFile gives a file's entry and content; the caller must close it.
func (s *Service) ReadFile(ctx context.Context, id string, f FileRef) (FileEntry, io.ReadCloser, error) {
	if err := f.validate(); err != nil {
		return FileEntry{}, nil, err
	}
	end, err := s.use(ctx, id, "reading a file")
	if err != nil {
		return FileEntry{}, nil, err
	}
	e, r, err := s.host.ReadFile(ctx, id, f)
	if err != nil {
		end()
		return e, nil, s.lost(ctx, id, fmt.Errorf("read file in %s: %w", id, err))
	}
	return e, &trackedReader{ReadCloser: r, end: end}, nil
}

type trackedReader struct {
	io.ReadCloser
	end  func()
	once sync.Once
}

func (t *trackedReader) Close() error {
	err := t.ReadCloser.Close()
	t.once.Do(t.end)
	return err
}

// WriteFile creates or replaces a file by all that body gives. mode 0 is 0644.
func (s *Service) WriteFile(ctx context.Context, id string, f FileRef, mode uint32, body io.Reader) (FileEntry, error) {
	if err := f.validate(); err != nil {
		return FileEntry{}, err
	}
	if mode > 0o7777 {
		return FileEntry{}, Invalid("mode", "must be permission bits in octal, at most 7777")
	}
	return fileCall(s, ctx, id, "writing a file", func(ctx context.Context) (FileEntry, error) {
		return s.host.WriteFile(ctx, id, f, mode, body)
	})
}

// ListFiles lists a directory down to depth levels; 0 is 1.
func (s *Service) ListFiles(ctx context.Context, id string, f FileRef, depth int64) ([]FileEntry, error) {
	if err := f.validate(); err != nil {
		return nil, err
	}
	if err := inRange("depth", depth, 0, MaxListDepth, ""); err != nil {
		return nil, err
	}
	return fileCall(s, ctx, id, "listing files", func(ctx context.Context) ([]FileEntry, error) {
		return s.host.ListFiles(ctx, id, f, uint32(max(depth, 1)))
	})
}

// MakeDir makes a directory and its parents.
func (s *Service) MakeDir(ctx context.Context, id string, f FileRef) (FileEntry, error) {
	if err := f.validate(); err != nil {
		return FileEntry{}, err
	}
	return fileCall(s, ctx, id, "making a directory", func(ctx context.Context) (FileEntry, error) {
		return s.host.MakeDir(ctx, id, f)
	})
}

// RemoveFile removes a file, or a directory with all in it.
func (s *Service) RemoveFile(ctx context.Context, id string, f FileRef) error {
	if err := f.validate(); err != nil {
		return err
	}
	_, err := fileCall(s, ctx, id, "removing a file", func(ctx context.Context) (struct{}, error) {
		return struct{}{}, s.host.RemoveFile(ctx, id, f)
	})
	return err
}

// fileCall does one call into a running sandbox, detached from the request. The
// limit is that of the longest command: an upload takes as long as its client
// sends, and removing a great directory may take long.
func fileCall[T any](s *Service, ctx context.Context, id, op string, call func(context.Context) (T, error)) (T, error) {
	var zero T
	end, err := s.use(ctx, id, op)
	if err != nil {
		return zero, err
	}
	defer end()
	callCtx, cancel := execContext(ctx, 0)
	defer cancel()
	v, err := call(callCtx)
	if err != nil {
		return zero, s.lost(ctx, id, fmt.Errorf("%s in %s: %w", op, id, err))
	}
	return v, nil
}

// Metrics reads the figures of a running sandbox. It is no activity.
func (s *Service) Metrics(ctx context.Context, id string) (Metrics, error) {
	if err := s.CheckRunning(ctx, id, "metrics"); err != nil {
		return Metrics{}, err
	}
	m, err := s.host.Metrics(ctx, id)
	if err != nil {
		return m, s.lost(ctx, id, fmt.Errorf("metrics of %s: %w", id, err))
	}
	return m, nil
}
