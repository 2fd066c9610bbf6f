package guest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"syscall"
	"time"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
	"git.omukk.dev/wrenn/sandbox/internal/gen/process/processconnect"
)

const (
	keepaliveHeader   = "Keepalive-Ping-Interval"
	defaultKeepalive  = 90 * time.Second
	maxKeepaliveHours = 24
)

// processService is process.Process.
type processService struct{ s *Server }

var _ processconnect.ProcessHandler = processService{}

// keepalive is how long a stream may be silent.
func keepalive(h http.Header) (time.Duration, error) {
	v := h.Get(keepaliveHeader)
	if v == "" {
		return defaultKeepalive, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > maxKeepaliveHours*3600 {
		return 0, invalidf("%s: %q is not 1 to %d seconds", keepaliveHeader, clip(v), maxKeepaliveHours*3600)
	}
	return time.Duration(n) * time.Second, nil
}

func (ps processService) Start(ctx context.Context, req *connect.Request[pb.StartRequest], stream *connect.ServerStream[pb.StartResponse]) error {
	ping, err := keepalive(req.Header())
	if err != nil {
		return err
	}
	m := req.Msg
	user, err := ps.s.callUser("", req.Header())
	if err != nil {
		return err
	}
	o := startOptions{tag: m.Tag, stdin: m.Stdin == nil || m.GetStdin(), pty: m.GetPty() != nil}
	if m.Tag != nil {
		if err := checkTag(m.GetTag()); err != nil {
			return err
		}
	}
	if o.pty {
		if o.cols, o.rows, err = termSize(m.GetPty()); err != nil {
			return err
		}
	}
	cmd, err := ps.s.newCommand(m.GetProcess(), user, o.pty)
	if err != nil {
		return err
	}
	if end, ok := ctx.Deadline(); ok {
		if o.lifetime = time.Until(end); o.lifetime <= 0 {
			return contextError(ctx)
		}
	}
	p, r, err := ps.s.procs.start(cmd, o)
	if err != nil {
		return err
	}
	defer r.detach()
	err = ps.follow(ctx, p, r, ping, func(e *pb.ProcessEvent) error {
		return stream.Send(&pb.StartResponse{Event: e})
	})
	if codeOf(err) == connect.CodeDeadlineExceeded {
		p.expire() // its own timer may be a moment later
	}
	return err
}

func (ps processService) Connect(ctx context.Context, req *connect.Request[pb.ConnectRequest], stream *connect.ServerStream[pb.ConnectResponse]) error {
	ping, err := keepalive(req.Header())
	if err != nil {
		return err
	}
	p, err := ps.s.procs.find(req.Msg.GetProcess(), true)
	if err != nil {
		return err
	}
	r := p.out.attach()
	defer r.detach()
	return ps.follow(ctx, p, r, ping, func(e *pb.ProcessEvent) error {
		return stream.Send(&pb.ConnectResponse{Event: e})
	})
}

// errTimeLimit stands in place of the end event of a process that was ended by
// its lifetime: the SDKs make their time-out error of it.
var errTimeLimit = connect.NewError(connect.CodeDeadlineExceeded, errors.New("the process's time limit is over"))

// follow sends a process's events until its end or the client's.
func (ps processService) follow(ctx context.Context, p *proc, r *reader, ping time.Duration, send func(*pb.ProcessEvent) error) error {
	start := &pb.ProcessEvent_StartEvent{Pid: uint32(p.pid)}
	if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Start{Start: start}}); err != nil {
		return err
	}
	ticker := time.NewTicker(ping)
	defer ticker.Stop()
	for {
		from, data, n, ended := r.peek()
		switch {
		case n > 0:
			if err := send(dataEvent(from, data)); err != nil {
				return err
			}
			r.ack(n)
			ticker.Reset(ping)
			if ctx.Err() != nil {
				return contextError(ctx)
			}
		case ended:
			end := p.out.ending()
			if !end.timedOut {
				if err := send(endEvent(end)); err != nil {
					return err
				}
			}
			ps.s.procs.forget(p)
			if end.timedOut {
				return errTimeLimit
			}
			return nil
		default:
			select {
			case <-r.wake:
			case <-ctx.Done():
				return contextError(ctx)
			case <-ticker.C:
				ka := &pb.ProcessEvent_Keepalive{Keepalive: &pb.ProcessEvent_KeepAlive{}}
				if err := send(&pb.ProcessEvent{Event: ka}); err != nil {
					return err
				}
			}
		}
	}
}

func dataEvent(from channel, data []byte) *pb.ProcessEvent {
	d := &pb.ProcessEvent_DataEvent{}
	switch from {
	case chanStdout:
		d.Output = &pb.ProcessEvent_DataEvent_Stdout{Stdout: data}
	case chanStderr:
		d.Output = &pb.ProcessEvent_DataEvent_Stderr{Stderr: data}
	case chanPTY:
		d.Output = &pb.ProcessEvent_DataEvent_Pty{Pty: data}
	}
	return &pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: d}}
}

func endEvent(e endState) *pb.ProcessEvent {
	end := &pb.ProcessEvent_EndEvent{ExitCode: int32(e.code), Exited: e.exited, Status: e.status}
	if !e.exited || e.code != 0 {
		end.Error = &e.status
	}
	return &pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: end}}
}

func (ps processService) List(context.Context, *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	res := &pb.ListResponse{}
	for _, p := range ps.s.procs.list() {
		res.Processes = append(res.Processes, &pb.ProcessInfo{Config: p.config, Pid: uint32(p.pid), Tag: p.tag})
	}
	return connect.NewResponse(res), nil
}

func (ps processService) Update(_ context.Context, req *connect.Request[pb.UpdateRequest]) (*connect.Response[pb.UpdateResponse], error) {
	p, err := ps.s.procs.find(req.Msg.GetProcess(), false)
	if err != nil {
		return nil, err
	}
	if req.Msg.GetPty() != nil {
		if p.term == nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("process %d has no terminal", p.pid))
		}
		cols, rows, err := termSize(req.Msg.GetPty())
		if err != nil {
			return nil, err
		}
		if err := resize(p.term, cols, rows); err != nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, err)
		}
	}
	return connect.NewResponse(&pb.UpdateResponse{}), nil
}

// send writes one input message to a process.
func (ps processService) send(ctx context.Context, p *proc, in *pb.ProcessInput) error {
	var data []byte
	switch x := in.GetInput().(type) {
	case *pb.ProcessInput_Stdin:
		if p.term != nil {
			return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("process %d has a terminal: send pty", p.pid))
		}
		data = x.Stdin
	case *pb.ProcessInput_Pty:
		if p.term == nil {
			return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("process %d has no terminal: send stdin", p.pid))
		}
		data = x.Pty
	default:
		return invalidf("input: stdin or pty is missing")
	}
	if p.in == nil {
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("process %d was started without an input", p.pid))
	}
	return p.in.write(ctx, data)
}

func (ps processService) SendInput(ctx context.Context, req *connect.Request[pb.SendInputRequest]) (*connect.Response[pb.SendInputResponse], error) {
	p, err := ps.s.procs.find(req.Msg.GetProcess(), false)
	if err != nil {
		return nil, err
	}
	if err := ps.send(ctx, p, req.Msg.GetInput()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.SendInputResponse{}), nil
}

func (ps processService) StreamInput(ctx context.Context, stream *connect.ClientStream[pb.StreamInputRequest]) (*connect.Response[pb.StreamInputResponse], error) {
	var p *proc
	for stream.Receive() {
		switch x := stream.Msg().GetEvent().(type) {
		case *pb.StreamInputRequest_Start:
			if p != nil {
				return nil, invalidf("start: only the first message may be one")
			}
			var err error
			if p, err = ps.s.procs.find(x.Start.GetProcess(), false); err != nil {
				return nil, err
			}
		case *pb.StreamInputRequest_Data:
			if p == nil {
				return nil, invalidf("start: must be the first message")
			}
			if err := ps.send(ctx, p, x.Data.GetInput()); err != nil {
				return nil, err
			}
		case *pb.StreamInputRequest_Keepalive:
		default:
			return nil, invalidf("event: missing")
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.StreamInputResponse{}), nil
}

func (ps processService) SendSignal(_ context.Context, req *connect.Request[pb.SendSignalRequest]) (*connect.Response[pb.SendSignalResponse], error) {
	var sig syscall.Signal
	switch req.Msg.GetSignal() {
	case pb.Signal_SIGNAL_SIGTERM:
		sig = syscall.SIGTERM
	case pb.Signal_SIGNAL_SIGKILL:
		sig = syscall.SIGKILL
	default:
		return nil, invalidf("signal: must be SIGNAL_SIGTERM or SIGNAL_SIGKILL")
	}
	p, err := ps.s.procs.find(req.Msg.GetProcess(), false)
	if err != nil {
		return nil, err
	}
	if err := p.signal(sig); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.SendSignalResponse{}), nil
}

func (ps processService) CloseStdin(ctx context.Context, req *connect.Request[pb.CloseStdinRequest]) (*connect.Response[pb.CloseStdinResponse], error) {
	p, err := ps.s.procs.find(req.Msg.GetProcess(), false)
	if err != nil {
		return nil, err
	}
	if p.in != nil {
		if err := p.in.closeWrite(ctx); err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(&pb.CloseStdinResponse{}), nil
}
