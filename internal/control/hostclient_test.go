package control_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	hostagentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1/hostagentv1connect"
)

// agent is the server side: it answers what a test put in.
type agent struct {
	hostagentv1connect.UnimplementedHostAgentServiceHandler
	err   error
	state hostagentv1.SandboxState
	// exec is the last Exec; wrote is what WriteFile took, whole or not.
	exec  *hostagentv1.ExecRequest
	wrote chan written
	// cut breaks the answer of pauses.
	cut atomic.Bool
	// left is closed when a tunnel's caller has gone.
	left chan struct{}
}

type written struct {
	content string
	err     error
}

func (a *agent) PauseSandbox(_ context.Context, r *connect.Request[hostagentv1.PauseSandboxRequest]) (*connect.Response[hostagentv1.PauseSandboxResponse], error) {
	if a.cut.Load() {
		panic(http.ErrAbortHandler)
	}
	if a.err != nil {
		return nil, a.err
	}
	return connect.NewResponse(&hostagentv1.PauseSandboxResponse{Sandbox: &hostagentv1.Sandbox{Id: r.Msg.GetId(), State: a.state}}), nil
}

func (a *agent) ListSandboxes(context.Context, *connect.Request[hostagentv1.ListSandboxesRequest]) (*connect.Response[hostagentv1.ListSandboxesResponse], error) {
	at := timestamppb.New(time.Unix(100, 0))
	out := &hostagentv1.ListSandboxesResponse{}
	for _, st := range []hostagentv1.SandboxState{
		hostagentv1.SandboxState_SANDBOX_STATE_RUNNING, hostagentv1.SandboxState_SANDBOX_STATE_PAUSED,
		hostagentv1.SandboxState_SANDBOX_STATE_ERROR, hostagentv1.SandboxState_SANDBOX_STATE_STARTING, 99,
	} {
		out.Sandboxes = append(out.Sandboxes, &hostagentv1.Sandbox{
			Id: "a", State: st, Template: "base", Vcpus: 2, MemoryMb: 256, Error: "e", CreatedAt: at, Annotations: []byte("{}"),
		})
	}
	return connect.NewResponse(out), nil
}

func (a *agent) WatchSandboxes(_ context.Context, _ *connect.Request[hostagentv1.WatchSandboxesRequest], s *connect.ServerStream[hostagentv1.WatchSandboxesResponse]) error {
	return errors.Join(
		s.Send(&hostagentv1.WatchSandboxesResponse{Sandbox: &hostagentv1.Sandbox{Id: "a"}}),
		s.Send(&hostagentv1.WatchSandboxesResponse{Synced: true}))
}

func (a *agent) Exec(_ context.Context, r *connect.Request[hostagentv1.ExecRequest]) (*connect.Response[hostagentv1.ExecResponse], error) {
	a.exec = r.Msg
	return connect.NewResponse(&hostagentv1.ExecResponse{Stdout: []byte("o"), ExitCode: -1, DurationUs: 1500, TimedOut: true}), nil
}

// ExecStream echoes input as output until stop.
func (a *agent) ExecStream(_ context.Context, s *connect.BidiStream[hostagentv1.ExecStreamRequest, hostagentv1.ExecStreamResponse]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	if first.GetStart().GetCmd() == "refused" {
		return connect.NewError(connect.CodeNotFound, errors.New("cmd: not found"))
	}
	_ = s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Pid{Pid: first.GetStart().GetPty().GetCols()}})
	for {
		m, err := s.Receive()
		if err != nil {
			return err
		}
		switch v := m.GetMessage().(type) {
		case *hostagentv1.ExecStreamRequest_Stdin:
			_ = s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Stdout{Stdout: v.Stdin}})
		case *hostagentv1.ExecStreamRequest_CloseStdin:
			_ = s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Stderr{Stderr: []byte("eof")}})
		case *hostagentv1.ExecStreamRequest_Resize:
			_ = s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Pty{Pty: []byte("resized")}})
		case *hostagentv1.ExecStreamRequest_Stop:
			_ = s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Exit{Exit: &hostagentv1.ExecExit{ExitCode: 143, Error: "signal"}}})
			return nil
		}
	}
}

func (a *agent) ReadFile(_ context.Context, r *connect.Request[hostagentv1.ReadFileRequest], s *connect.ServerStream[hostagentv1.ReadFileResponse]) error {
	if r.Msg.GetPath() == "/none" {
		return connect.NewError(connect.CodeNotFound, errors.New("path: no such file"))
	}
	_ = s.Send(&hostagentv1.ReadFileResponse{Message: &hostagentv1.ReadFileResponse_Entry{Entry: &hostagentv1.FileEntry{Name: "f", Size: 6}}})
	for _, part := range []string{"abc", "", "def"} {
		_ = s.Send(&hostagentv1.ReadFileResponse{Message: &hostagentv1.ReadFileResponse_Data{Data: []byte(part)}})
	}
	if r.Msg.GetPath() == "/broken" {
		return connect.NewError(connect.CodeInternal, errors.New("disk"))
	}
	return nil
}

func (a *agent) WriteFile(_ context.Context, s *connect.ClientStream[hostagentv1.WriteFileRequest]) (*connect.Response[hostagentv1.WriteFileResponse], error) {
	var w written
	for s.Receive() {
		w.content += string(s.Msg().GetData())
	}
	w.err = s.Err()
	a.wrote <- w
	if w.err != nil {
		return nil, w.err
	}
	return connect.NewResponse(&hostagentv1.WriteFileResponse{Entry: &hostagentv1.FileEntry{Size: uint64(len(w.content))}}), nil
}

func connectAgent(t *testing.T) (*agent, control.Host) {
	t.Helper()
	a := &agent{state: hostagentv1.SandboxState_SANDBOX_STATE_PAUSED, wrote: make(chan written, 1)}
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentServiceHandler(a))
	// As the server speaks with its agent.
	var h2 http.Protocols
	h2.SetUnencryptedHTTP2(true)
	srv := httptest.NewUnstartedServer(mux)
	srv.Config.Protocols = &h2
	srv.Start()
	t.Cleanup(srv.Close)
	client := &http.Client{Transport: &http.Transport{Protocols: &h2}}
	return a, control.NewHost(hostagentv1connect.NewHostAgentServiceClient(client, srv.URL))
}

func (a *agent) Tunnel(ctx context.Context, st *connect.BidiStream[hostagentv1.TunnelRequest, hostagentv1.TunnelResponse]) error {
	if _, err := st.Receive(); err != nil {
		return err
	}
	if err := st.Send(&hostagentv1.TunnelResponse{Message: &hostagentv1.TunnelResponse_Open{Open: &hostagentv1.TunnelOpened{}}}); err != nil {
		return err
	}
	<-ctx.Done() // a guest that says nothing
	close(a.left)
	return ctx.Err()
}

// A connection to a silent guest that is closed ends on both sides: a stranger
// who hangs up must leave nothing.
func TestAClosedTunnelEndsOnBothSides(t *testing.T) {
	a, h := connectAgent(t)
	a.left = make(chan struct{})
	c, err := h.Dial(t.Context(), "a", 80)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	read := make(chan error)
	go func() {
		_, err := c.Read(make([]byte, 1))
		read <- err
	}()
	// It must be waiting in the transport, which no longer looks at a context.
	stacks := make([]byte, 1<<20)
	for waits := false; !waits; {
		all := string(stacks[:runtime.Stack(stacks, true)])
		for _, g := range strings.Split(all, "\n\n") {
			waits = waits || strings.Contains(g, "http2pipe).Read") && strings.Contains(g, "tunnel).Read")
		}
	}
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err == nil {
		t.Error("a read of a closed connection succeeds")
	}
	<-a.left
}

func TestHostErrors(t *testing.T) {
	t.Parallel()
	a, h := connectAgent(t)
	for code, want := range map[connect.Code]control.Code{
		connect.CodeInvalidArgument:    control.CodeInvalid,
		connect.CodeNotFound:           control.CodeNotFound,
		connect.CodeAlreadyExists:      control.CodeConflict,
		connect.CodeFailedPrecondition: control.CodeInvalidState,
		connect.CodeResourceExhausted:  control.CodeHostUnavailable,
		connect.CodeUnavailable:        control.CodeHostUnavailable,
		connect.CodeInternal:           control.CodeInternal,
		connect.CodeUnimplemented:      control.CodeInternal,
	} {
		a.err = connect.NewError(code, errors.New("said so"))
		_, err := h.PauseSandbox(t.Context(), "a")
		var e *control.Error
		if !errors.As(err, &e) || e.Code != want || e.Message != "said so" || e.Uncertain {
			t.Errorf("%s: %+v", code, e)
		}
	}
	a.err = nil
	uncertain := func(what string, err error, want bool) {
		t.Helper()
		var e *control.Error
		if !errors.As(err, &e) || e.Uncertain != want {
			t.Errorf("%s: %v; uncertain must be %v", what, err, want)
		}
	}
	a.cut.Store(true)
	_, err := h.PauseSandbox(t.Context(), "a")
	uncertain("broken connection", err, true)
	a.cut.Store(false)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = h.PauseSandbox(ctx, "a")
	uncertain("cancelled", err, true)
	a.state = hostagentv1.SandboxState_SANDBOX_STATE_RUNNING
	_, err = h.PauseSandbox(t.Context(), "a")
	uncertain("an answer with another state", err, true)
	gone := control.NewHost(hostagentv1connect.NewHostAgentServiceClient(http.DefaultClient, "http://127.0.0.1:1"))
	_, err = gone.PauseSandbox(t.Context(), "a")
	uncertain("nobody listens", err, false)
	code(t, err, control.CodeHostUnavailable)
}

func TestHostTranslates(t *testing.T) {
	t.Parallel()
	a, h := connectAgent(t)
	list, err := h.ListSandboxes(t.Context())
	if err != nil || len(list) != 5 {
		t.Fatal(list, err)
	}
	for i, st := range []control.HostState{control.HostRunning, control.HostPaused, control.HostError, control.HostMoving, control.HostMoving} {
		if list[i].State != st || list[i].VCPUs != 2 || list[i].MemoryMB != 256 || list[i].CreatedAt.Unix() != 100 || !list[i].StartedAt.IsZero() {
			t.Errorf("%d: %+v", i, list[i])
		}
	}
	var events []control.HostEvent
	if err := h.WatchSandboxes(t.Context(), func(e control.HostEvent) { events = append(events, e) }); err == nil {
		t.Error("a watch that ended gave no error")
	}
	if len(events) != 2 || events[0].Sandbox.ID != "a" || !events[1].Synced {
		t.Errorf("events %+v", events)
	}
	res, err := h.Exec(t.Context(), "a", control.ExecRequest{Cmd: "x"})
	if err != nil || res.ExitCode != -1 || res.Duration != 1500*time.Microsecond || !res.TimedOut {
		t.Errorf("%+v, %v", res, err)
	}
	if a.exec.GetTimeoutSec() != control.MaxExecSec {
		t.Errorf("no limit became %d", a.exec.GetTimeoutSec())
	}
}

func TestHostExecStream(t *testing.T) {
	t.Parallel()
	_, h := connectAgent(t)
	st, err := h.ExecStream(t.Context(), "a", control.ExecRequest{Cmd: "x", Pty: &control.PtySize{Cols: 80, Rows: 24}})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	for _, in := range []control.ExecInput{
		{Stdin: []byte("hi")}, {CloseStdin: true}, {Resize: &control.PtySize{Cols: 1, Rows: 1}}, {Stop: true},
	} {
		if err := st.Send(in); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []control.ExecEvent{
		{Kind: control.EventStart, PID: 80}, {Kind: control.EventStdout, Data: []byte("hi")},
		{Kind: control.EventStderr, Data: []byte("eof")}, {Kind: control.EventPty, Data: []byte("resized")},
		{Kind: control.EventExit, ExitCode: 143, Reason: "signal"},
	} {
		got, err := st.Recv()
		if err != nil || got.Kind != want.Kind || got.PID != want.PID || string(got.Data) != string(want.Data) || got.ExitCode != want.ExitCode || got.Reason != want.Reason {
			t.Fatalf("%+v, %v; want %+v", got, err, want)
		}
	}
	if _, err := st.Recv(); err != io.EOF {
		t.Errorf("after the exit: %v", err)
	}
	st, err = h.ExecStream(t.Context(), "a", control.ExecRequest{Cmd: "refused"})
	if err == nil {
		_, err = st.Recv()
		_ = st.Close()
	}
	code(t, err, control.CodeNotFound)
}

func TestHostFiles(t *testing.T) {
	t.Parallel()
	a, h := connectAgent(t)
	e, r, err := h.ReadFile(t.Context(), "a", control.FileRef{Path: "/f"})
	if err != nil || e.Size != 6 {
		t.Fatal(e, err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "abcdef" {
		t.Errorf("%q, %v", b, err)
	}
	_ = r.Close()
	_, _, err = h.ReadFile(t.Context(), "a", control.FileRef{Path: "/none"})
	code(t, err, control.CodeNotFound)
	_, r, err = h.ReadFile(t.Context(), "a", control.FileRef{Path: "/broken"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(r); err == nil {
		t.Error("a read that broke looked whole")
	}
	_ = r.Close()

	long := strings.Repeat("0123456789", 30_000)
	if e, err := h.WriteFile(t.Context(), "a", control.FileRef{Path: "/f"}, 0, strings.NewReader(long)); err != nil || e.Size != uint64(len(long)) {
		t.Error(e, err)
	}
	if w := <-a.wrote; w.err != nil || w.content != long {
		t.Errorf("%d bytes, %v", len(w.content), w.err)
	}
	// A body that is cut short must not look whole to the agent.
	cut := io.MultiReader(strings.NewReader("half"), errReader{io.ErrUnexpectedEOF})
	if _, err := h.WriteFile(t.Context(), "a", control.FileRef{Path: "/f"}, 0, cut); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error %v", err)
	}
	if w := <-a.wrote; w.err == nil {
		t.Errorf("the agent took %q for the whole", w.content)
	}
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }
