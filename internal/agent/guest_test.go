package agent

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/gen/process"
	"git.omukk.dev/wrenn/sandbox/internal/gen/process/processconnect"
)

// fakeProcesses is the process service of every guest. Programs: echo prints
// its arguments, cat its input, exit and kill end as told, flood never stops
// printing; refuse has the agent refuse with a code.
type fakeProcesses struct {
	processconnect.UnimplementedProcessHandler

	mu    sync.Mutex
	procs map[uint32]*fakeProcess
	users []string // Authorization of each start
}

type fakeProcess struct {
	in     chan []byte // closed with the input
	once   sync.Once
	signal chan process.Signal
}

func newFakeProcesses() (*fakeProcesses, http.Handler) {
	f := &fakeProcesses{procs: map[uint32]*fakeProcess{}}
	mux := http.NewServeMux()
	mux.Handle(processconnect.NewProcessHandler(f))
	return f, mux
}

func started(pid uint32) *process.ProcessEvent {
	return &process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: pid}}}
}

func printed(b []byte) *process.ProcessEvent {
	return &process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: &process.ProcessEvent_DataEvent{
		Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: b},
	}}}
}

func ended(code int32, status string) *process.ProcessEvent {
	return &process.ProcessEvent{Event: &process.ProcessEvent_End{End: &process.ProcessEvent_EndEvent{
		ExitCode: code, Exited: status == "", Status: status,
	}}}
}

func (f *fakeProcesses) Start(ctx context.Context, req *connect.Request[process.StartRequest], stream *connect.ServerStream[process.StartResponse]) error {
	cfg := req.Msg.GetProcess()
	if cfg.Cmd == "refuse" {
		var code connect.Code
		if err := code.UnmarshalText([]byte(cfg.Args[0])); err != nil {
			return err
		}
		return connect.NewError(code, fmt.Errorf("refused: %s", cfg.Args[0]))
	}
	p := &fakeProcess{in: make(chan []byte, 16), signal: make(chan process.Signal, 4)}
	f.mu.Lock()
	pid := uint32(len(f.procs) + 100)
	f.procs[pid] = p
	f.users = append(f.users, req.Header().Get("Authorization"))
	f.mu.Unlock()
	send := func(e *process.ProcessEvent) error { return stream.Send(&process.StartResponse{Event: e}) }
	if err := send(started(pid)); err != nil {
		return err
	}
	return p.run(ctx, cfg, send)
}

func (f *fakeProcesses) Connect(ctx context.Context, req *connect.Request[process.ConnectRequest], stream *connect.ServerStream[process.ConnectResponse]) error {
	pid := req.Msg.GetProcess().GetPid()
	p := f.find(pid)
	if p == nil {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("no process %d", pid))
	}
	send := func(e *process.ProcessEvent) error { return stream.Send(&process.ConnectResponse{Event: e}) }
	if err := send(started(pid)); err != nil {
		return err
	}
	return p.run(ctx, &process.ProcessConfig{Cmd: "cat"}, send)
}

func (p *fakeProcess) run(ctx context.Context, cfg *process.ProcessConfig, send func(*process.ProcessEvent) error) error {
	switch cfg.Cmd {
	case "echo":
		for _, a := range cfg.Args {
			if err := send(printed([]byte(a))); err != nil {
				return err
			}
		}
	case "exit":
		var n int32
		fmt.Sscan(cfg.Args[0], &n)
		return send(ended(n, ""))
	case "flood":
		for block := bytes.Repeat([]byte("x"), 1<<20); ; {
			select {
			case <-p.signal:
				return send(ended(0, "signal: killed"))
			default:
			}
			if err := send(printed(block)); err != nil {
				return err
			}
		}
	case "cat":
		for {
			select {
			case b, ok := <-p.in:
				if !ok {
					return send(ended(0, ""))
				}
				if err := send(printed(b)); err != nil {
					return err
				}
			case s := <-p.signal:
				return send(ended(0, map[process.Signal]string{
					process.Signal_SIGNAL_SIGTERM: "signal: terminated", process.Signal_SIGNAL_SIGKILL: "signal: killed",
				}[s]))
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Minute):
				return connect.NewError(connect.CodeInternal, fmt.Errorf("nothing came"))
			}
		}
	}
	return send(ended(0, ""))
}

func (f *fakeProcesses) find(pid uint32) *fakeProcess {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.procs[pid]
}

func (f *fakeProcesses) SendInput(_ context.Context, req *connect.Request[process.SendInputRequest]) (*connect.Response[process.SendInputResponse], error) {
	p := f.find(req.Msg.GetProcess().GetPid())
	if p == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no such process"))
	}
	p.in <- req.Msg.GetInput().GetStdin()
	return connect.NewResponse(&process.SendInputResponse{}), nil
}

func (f *fakeProcesses) CloseStdin(_ context.Context, req *connect.Request[process.CloseStdinRequest]) (*connect.Response[process.CloseStdinResponse], error) {
	if p := f.find(req.Msg.GetProcess().GetPid()); p != nil {
		p.once.Do(func() { close(p.in) })
	}
	return connect.NewResponse(&process.CloseStdinResponse{}), nil
}

func (f *fakeProcesses) SendSignal(_ context.Context, req *connect.Request[process.SendSignalRequest]) (*connect.Response[process.SendSignalResponse], error) {
	if p := f.find(req.Msg.GetProcess().GetPid()); p != nil {
		p.signal <- req.Msg.GetSignal()
	}
	return connect.NewResponse(&process.SendSignalResponse{}), nil
}
