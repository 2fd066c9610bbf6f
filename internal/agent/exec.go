package agent

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	agentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/process"
)

// maxExecOutput bounds what Exec collects: it is held in memory. A command
// that says more is ended; ExecStream has no such bound.
const maxExecOutput = 32 << 20

// stdinChunk bounds one SendInput call.
const stdinChunk = 64 << 10

// command is one process in a guest, seen through the stream of its events.
type command struct {
	guest  *engine.Guest
	user   string
	stream eventStream
	pid    uint32
}

// eventStream is what a start and an attach have in common.
type eventStream interface {
	Receive() bool
	Err() error
	Close() error
	event() *process.ProcessEvent
}

type startStream struct {
	*connect.ServerStreamForClient[process.StartResponse]
}

func (s startStream) event() *process.ProcessEvent { return s.Msg().GetEvent() }

type attachStream struct {
	*connect.ServerStreamForClient[process.ConnectResponse]
}

func (s attachStream) event() *process.ProcessEvent { return s.Msg().GetEvent() }

// attachCommand picks up a process that runs.
func attachCommand(ctx context.Context, g *engine.Guest, s *agentv1.ExecStart) (*command, error) {
	if s.Cmd != "" || len(s.Args) > 0 || s.Pty != nil {
		return nil, fmt.Errorf("%w: attach_pid starts nothing; leave cmd, args and pty out", engine.ErrInvalid)
	}
	stream, err := g.Process.Connect(ctx, connect.NewRequest(&process.ConnectRequest{
		Process: &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: s.AttachPid}},
	}))
	if err != nil {
		return nil, guestError(err)
	}
	return begun(&command{guest: g, user: s.User, stream: attachStream{stream}})
}

// startCommand starts a process and returns when it has its number.
func startCommand(ctx context.Context, g *engine.Guest, s *agentv1.ExecStart, stdin bool) (*command, error) {
	if s.Cmd == "" {
		return nil, fmt.Errorf("%w: cmd is empty; name the program to run", engine.ErrInvalid)
	}
	cfg := &process.ProcessConfig{Cmd: s.Cmd, Args: s.Args, Envs: s.Envs}
	if s.Cwd != "" {
		cfg.Cwd = &s.Cwd
	}
	msg := &process.StartRequest{Process: cfg, Stdin: &stdin}
	if s.Pty != nil {
		if s.Pty.Cols == 0 || s.Pty.Rows == 0 || s.Pty.Cols > 10000 || s.Pty.Rows > 10000 {
			return nil, fmt.Errorf("%w: pty of %d columns and %d rows; want 1 to 10000 of each", engine.ErrInvalid, s.Pty.Cols, s.Pty.Rows)
		}
		msg.Pty = ptySize(s.Pty)
	}
	req := connect.NewRequest(msg)
	asUser(req.Header(), s.User)
	stream, err := g.Process.Start(ctx, req)
	if err != nil {
		return nil, guestError(err)
	}
	return begun(&command{guest: g, user: s.User, stream: startStream{stream}})
}

// begun waits for the first event, which tells the process's number.
func begun(c *command) (*command, error) {
	if !c.stream.Receive() {
		err := c.stream.Err()
		c.stream.Close()
		if err == nil {
			err = errors.New("the guest agent ended the stream before the process began")
		}
		return nil, guestError(err)
	}
	start := c.stream.event().GetStart()
	if start == nil {
		c.stream.Close()
		return nil, errors.New("the guest agent's first event is not the start")
	}
	c.pid = start.Pid
	return c, nil
}

func ptySize(p *agentv1.PtySize) *process.PTY {
	return &process.PTY{Size: &process.PTY_Size{Cols: p.Cols, Rows: p.Rows}}
}

// asUser names the user that a call acts as; empty is the guest's default.
func asUser(h http.Header, user string) {
	if user != "" {
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":")))
	}
}

func (c *command) selector() *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: c.pid}}
}

// input sends bytes to the process, and closes its input if asked.
func (c *command) input(ctx context.Context, b []byte, pty bool) error {
	for len(b) > 0 {
		n := min(len(b), stdinChunk)
		in := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: b[:n]}}
		if pty {
			in.Input = &process.ProcessInput_Pty{Pty: b[:n]}
		}
		if _, err := c.guest.Process.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: c.selector(), Input: in})); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func (c *command) closeInput(ctx context.Context) error {
	_, err := c.guest.Process.CloseStdin(ctx, connect.NewRequest(&process.CloseStdinRequest{Process: c.selector()}))
	return err
}

func (c *command) signal(ctx context.Context, s process.Signal) error {
	_, err := c.guest.Process.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{Process: c.selector(), Signal: s}))
	return err
}

// events calls yield for every event until the end event, which it returns.
func (c *command) events(yield func(*process.ProcessEvent_DataEvent) error) (*process.ProcessEvent_EndEvent, error) {
	for c.stream.Receive() {
		ev := c.stream.event()
		if end := ev.GetEnd(); end != nil {
			return end, nil
		}
		if data := ev.GetData(); data != nil {
			if err := yield(data); err != nil {
				return nil, err
			}
		}
	}
	if err := c.stream.Err(); err != nil {
		return nil, err
	}
	return nil, errors.New("the guest agent ended the stream before the process ended")
}

// Exec implements hostagent.v1.
func (a *Agent) Exec(ctx context.Context, req *connect.Request[agentv1.ExecRequest]) (*connect.Response[agentv1.ExecResponse], error) {
	m := req.Msg
	g, err := a.engine.Guest(m.SandboxId)
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	ctx, cancel := withLimit(ctx, m.TimeoutSec)
	defer cancel()
	began := time.Now()
	c, err := startCommand(ctx, g, &agentv1.ExecStart{
		Cmd: m.Cmd, Args: m.Args, Envs: m.Envs, Cwd: m.Cwd, User: m.User,
	}, len(m.Stdin) > 0)
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	defer c.stream.Close()
	if len(m.Stdin) > 0 {
		// Beside the output: a process that answers as it reads would stand
		// still if its output were not taken meanwhile.
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			if c.input(ctx, m.Stdin, false) == nil {
				c.closeInput(ctx)
			} // else the process has ended or closed its input, which is its right
		}()
		defer func() { cancel(); <-ended }()
	}
	out, err := collect(c)
	out.DurationUs = time.Since(began).Microseconds()
	if err != nil {
		if timedOut(ctx, m.TimeoutSec, err) {
			out.TimedOut, out.ExitCode = true, -1
			return connect.NewResponse(out), nil
		}
		return nil, a.wire(ctx, guestError(err))
	}
	return connect.NewResponse(out), nil
}

// withLimit bounds a command's life; the guest agent learns the limit from
// the deadline and ends the process itself.
func withLimit(ctx context.Context, sec uint32) (context.Context, context.CancelFunc) {
	if sec == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Duration(sec)*time.Second)
}

// timedOut tells whether a command was ended by its own limit. Whoever notices
// first says so: the guest agent, or our side of the connection.
func timedOut(ctx context.Context, sec uint32, err error) bool {
	return err != nil && sec > 0 &&
		(connect.CodeOf(err) == connect.CodeDeadlineExceeded || errors.Is(ctx.Err(), context.DeadlineExceeded))
}

func collect(c *command) (*agentv1.ExecResponse, error) {
	var stdout, stderr bytes.Buffer
	end, err := c.events(func(d *process.ProcessEvent_DataEvent) error {
		stdout.Write(d.GetStdout())
		stderr.Write(d.GetStderr())
		if stdout.Len()+stderr.Len() > maxExecOutput {
			c.signal(context.Background(), process.Signal_SIGNAL_SIGKILL)
			return connect.NewError(connect.CodeOutOfRange, fmt.Errorf("the command printed more than %d MiB and was ended; use the stream, or write to a file", maxExecOutput>>20))
		}
		return nil
	})
	out := &agentv1.ExecResponse{Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
	if err != nil {
		return out, err
	}
	out.ExitCode = exitCode(end)
	return out, nil
}

// exitCode is the process's own, or 128 + n where signal n ended it, as
// shells say it. The guest agent tells the signal by its name only.
func exitCode(end *process.ProcessEvent_EndEvent) int32 {
	if end.Exited {
		return end.ExitCode
	}
	name, _ := strings.CutPrefix(end.Status, "signal: ")
	name, _ = strings.CutSuffix(name, " (core dumped)")
	for n := syscall.Signal(1); n < 32; n++ {
		if n.String() == name {
			return 128 + int32(n)
		}
	}
	return 128
}

// ExecStream implements hostagent.v1.
func (a *Agent) ExecStream(ctx context.Context, stream *connect.BidiStream[agentv1.ExecStreamRequest, agentv1.ExecStreamResponse]) error {
	first, err := stream.Receive()
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("the first message: %w", err))
	}
	start := first.GetStart()
	if start == nil {
		return connect.NewError(connect.CodeInvalidArgument, errors.New("the first message must be start"))
	}
	g, err := a.engine.Guest(start.SandboxId)
	if err != nil {
		return a.wire(ctx, err)
	}
	ctx, cancel := withLimit(ctx, start.TimeoutSec)
	defer cancel()
	var c *command
	if start.AttachPid != 0 {
		c, err = attachCommand(ctx, g, start)
	} else {
		c, err = startCommand(ctx, g, start, true)
	}
	if err != nil {
		return a.wire(ctx, err)
	}
	defer c.stream.Close()
	if err := stream.Send(&agentv1.ExecStreamResponse{Message: &agentv1.ExecStreamResponse_Pid{Pid: c.pid}}); err != nil {
		return err
	}
	// Ends when the caller half-closes or the stream is over; the handler's
	// return makes Receive fail, so it never outlives the call by long.
	go a.forwardInput(ctx, stream, c, start.Pty != nil)
	end, err := c.events(func(d *process.ProcessEvent_DataEvent) error { return stream.Send(outputOf(d)) })
	if timedOut(ctx, start.TimeoutSec, err) {
		return stream.Send(&agentv1.ExecStreamResponse{Message: &agentv1.ExecStreamResponse_Exit{
			Exit: &agentv1.ExecExit{ExitCode: -1, Error: fmt.Sprintf("ended at its time limit of %d s", start.TimeoutSec)},
		}})
	}
	if err != nil {
		return a.wire(ctx, guestError(err))
	}
	exit := &agentv1.ExecExit{ExitCode: exitCode(end)}
	if !end.Exited {
		exit.Error = end.Status
	}
	return stream.Send(&agentv1.ExecStreamResponse{Message: &agentv1.ExecStreamResponse_Exit{Exit: exit}})
}

func outputOf(d *process.ProcessEvent_DataEvent) *agentv1.ExecStreamResponse {
	out := &agentv1.ExecStreamResponse{}
	switch o := d.Output.(type) {
	case *process.ProcessEvent_DataEvent_Stdout:
		out.Message = &agentv1.ExecStreamResponse_Stdout{Stdout: o.Stdout}
	case *process.ProcessEvent_DataEvent_Stderr:
		out.Message = &agentv1.ExecStreamResponse_Stderr{Stderr: o.Stderr}
	case *process.ProcessEvent_DataEvent_Pty:
		out.Message = &agentv1.ExecStreamResponse_Pty{Pty: o.Pty}
	}
	return out
}

// stopGrace is how long a process may take to end by SIGTERM.
const stopGrace = 5 * time.Second

// forwardInput passes on what the caller sends until there is no more.
func (a *Agent) forwardInput(ctx context.Context, stream *connect.BidiStream[agentv1.ExecStreamRequest, agentv1.ExecStreamResponse], c *command, pty bool) {
	for {
		m, err := stream.Receive()
		if err != nil {
			if errors.Is(err, io.EOF) && !pty {
				c.closeInput(ctx)
			}
			return
		}
		switch {
		case m.GetStdin() != nil:
			err = c.input(ctx, m.GetStdin(), pty)
		case m.GetCloseStdin():
			err = c.closeInput(ctx)
		case m.GetResize() != nil:
			_, err = c.guest.Process.Update(ctx, connect.NewRequest(&process.UpdateRequest{Process: c.selector(), Pty: ptySize(m.GetResize())}))
		case m.GetStop():
			err = c.signal(ctx, process.Signal_SIGNAL_SIGTERM)
			timer := time.AfterFunc(stopGrace, func() { c.signal(ctx, process.Signal_SIGNAL_SIGKILL) })
			defer timer.Stop()
		}
		if err != nil && ctx.Err() == nil {
			// The process has ended, or closed its input: its end tells more.
			a.log.Debug("input was not taken", "pid", c.pid, "err", err)
		}
	}
}

// guestError translates what a guest agent answered. What it says of the
// request is for the user; that it cannot be reached is ours.
func guestError(err error) error {
	var ce *connect.Error
	if !errors.As(err, &ce) || errors.Is(err, engine.ErrInvalid) {
		return err
	}
	switch ce.Code() {
	case connect.CodeInvalidArgument, connect.CodeUnauthenticated, connect.CodePermissionDenied:
		return fmt.Errorf("%w: %s", engine.ErrInvalid, ce.Message())
	case connect.CodeNotFound:
		return &guestWord{engine.ErrNotFound, ce.Message()}
	case connect.CodeAlreadyExists:
		return &guestWord{engine.ErrExists, ce.Message()}
	case connect.CodeUnavailable:
		return fmt.Errorf("the guest agent cannot be reached: %w", err)
	}
	return err
}

// guestWord is a guest agent's own sentence with our kind of error.
type guestWord struct {
	kind error
	text string
}

func (e *guestWord) Error() string { return e.text }
func (e *guestWord) Unwrap() error { return e.kind }
