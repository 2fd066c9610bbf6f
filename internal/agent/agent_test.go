package agent

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/engine/enginetest"
	agentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// rig is an agent on an engine on a host of fakes, and its client.
type rig struct {
	hostagentv1connect.HostAgentServiceClient
	t     *testing.T
	host  *enginetest.Host
	procs *fakeProcesses
}

func newRig(t *testing.T, change func(*engine.Options)) *rig {
	t.Helper()
	h := enginetest.New(t)
	procs, guest := newFakeProcesses()
	h.Guest = guest
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentServiceHandler(New(h.Start(change), "v1", slog.New(slog.DiscardHandler))))
	srv := httptest.NewUnstartedServer(mux)
	srv.EnableHTTP2 = true // streams in both directions
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return &rig{hostagentv1connect.NewHostAgentServiceClient(srv.Client(), srv.URL), t, h, procs}
}

func (r *rig) create(id string) {
	r.t.Helper()
	_, err := r.CreateSandbox(r.t.Context(), connect.NewRequest(&agentv1.CreateSandboxRequest{
		Id: id, Template: enginetest.BaseName, MemoryMb: vmm.MinMemoryMB, Annotations: []byte("note"),
	}))
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) state(id string) agentv1.SandboxState {
	r.t.Helper()
	l, err := r.ListSandboxes(r.t.Context(), connect.NewRequest(&agentv1.ListSandboxesRequest{}))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, s := range l.Msg.Sandboxes {
		if s.Id == id {
			if string(s.Annotations) != "note" || s.Template != enginetest.BaseName || s.MemoryMb != vmm.MinMemoryMB {
				r.t.Errorf("it is told as %v", s)
			}
			return s.State
		}
	}
	return agentv1.SandboxState_SANDBOX_STATE_UNSPECIFIED
}

func TestTheLifeCycleThroughTheAgent(t *testing.T) {
	r := newRig(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r.create("a")
	watch, err := r.WatchSandboxes(ctx, connect.NewRequest(&agentv1.WatchSandboxesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Close()
	if !watch.Receive() || watch.Msg().Sandbox.GetId() != "a" || !watch.Receive() || !watch.Msg().Synced {
		t.Fatalf("the watch begins with %v, %v", watch.Msg(), watch.Err())
	}
	if s := r.state("a"); s != agentv1.SandboxState_SANDBOX_STATE_RUNNING {
		t.Errorf("created, it is %v", s)
	}
	p, err := r.PauseSandbox(ctx, connect.NewRequest(&agentv1.PauseSandboxRequest{Id: "a"}))
	if err != nil || p.Msg.Stats.GetMemoryBytes() == 0 || p.Msg.Stats.GetPhasesUs()["commit"] == 0 {
		t.Errorf("pause: %v, %v", p, err)
	}
	if s := r.state("a"); s != agentv1.SandboxState_SANDBOX_STATE_PAUSED {
		t.Errorf("paused, it is %v", s)
	}
	if _, err := r.CreateSnapshot(ctx, connect.NewRequest(&agentv1.CreateSnapshotRequest{SandboxId: "a", Name: "s"})); err != nil {
		t.Errorf("snapshot: %v", err)
	}
	l, err := r.ListSnapshots(ctx, connect.NewRequest(&agentv1.ListSnapshotsRequest{}))
	if err != nil || len(l.Msg.Snapshots) != 2 {
		t.Errorf("templates: %v, %v", l, err)
	}
	if _, err := r.ResumeSandbox(ctx, connect.NewRequest(&agentv1.ResumeSandboxRequest{Id: "a"})); err != nil {
		t.Errorf("resume: %v", err)
	}
	if err := r.host.Driver.End("a", vmm.ReasonPanic); err != nil {
		t.Fatal(err)
	}
	if !watch.Receive() || watch.Msg().Sandbox.GetState() != agentv1.SandboxState_SANDBOX_STATE_ERROR || watch.Msg().Sandbox.GetError() == "" {
		t.Errorf("of a VM that died the watch says %v, %v", watch.Msg(), watch.Err())
	}
	if _, err := r.DestroySandbox(ctx, connect.NewRequest(&agentv1.DestroySandboxRequest{Id: "a"})); err != nil {
		t.Errorf("destroy: %v", err)
	}
	if !watch.Receive() || !watch.Msg().Removed {
		t.Errorf("of a removal the watch says %v, %v", watch.Msg(), watch.Err())
	}
	if _, err := r.DeleteSnapshot(ctx, connect.NewRequest(&agentv1.DeleteSnapshotRequest{Name: "s"})); err != nil {
		t.Errorf("delete the snapshot: %v", err)
	}
}

// TestErrorsHaveTheirCodes: what the control plane tells its callers hangs on
// them.
func TestErrorsHaveTheirCodes(t *testing.T) {
	r := newRig(t, func(o *engine.Options) { o.MemoryLimitMB = 2 * vmm.MinMemoryMB })
	ctx := t.Context()
	r.create("a")
	create := func(id, template string, mb uint32) error {
		_, err := r.CreateSandbox(ctx, connect.NewRequest(&agentv1.CreateSandboxRequest{Id: id, Template: template, MemoryMb: mb}))
		return err
	}
	resume := func(id string) error {
		_, err := r.ResumeSandbox(ctx, connect.NewRequest(&agentv1.ResumeSandboxRequest{Id: id}))
		return err
	}
	exec := func(id, cmd string, args ...string) error {
		_, err := r.Exec(ctx, connect.NewRequest(&agentv1.ExecRequest{SandboxId: id, Cmd: cmd, Args: args}))
		return err
	}
	for what, c := range map[string]struct {
		err   error
		code  connect.Code
		names string
	}{
		"a bad id":              {create("A/..", "base", 64), connect.CodeInvalidArgument, "id"},
		"an unknown template":   {create("b", "nope", 64), connect.CodeNotFound, "nope"},
		"an id that is taken":   {create("a", "base", 64), connect.CodeAlreadyExists, `"a"`},
		"no room":               {create("b", "base", 128), connect.CodeResourceExhausted, "--memory-limit"},
		"a wrong state":         {resume("a"), connect.CodeFailedPrecondition, "it is running"},
		"an unknown sandbox":    {resume("zz"), connect.CodeNotFound, "zz"},
		"exec in none":          {exec("zz", "echo"), connect.CodeNotFound, "zz"},
		"exec of nothing":       {exec("a", ""), connect.CodeInvalidArgument, "cmd"},
		"no such program":       {exec("a", "refuse", "not_found"), connect.CodeNotFound, "refused"},
		"a request of no sense": {exec("a", "refuse", "invalid_argument"), connect.CodeInvalidArgument, "refused"},
		"a guest's own fault":   {exec("a", "refuse", "internal"), connect.CodeInternal, ""},
	} {
		if connect.CodeOf(c.err) != c.code || !strings.Contains(c.err.Error(), c.names) {
			t.Errorf("%s: %v, want %v naming %q", what, c.err, c.code, c.names)
		}
	}
	a := &Agent{log: slog.New(slog.DiscardHandler)}
	if err := a.wire(t.Context(), unix.ENOSPC); connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "disk is full") {
		t.Errorf("a full disk: %v", err)
	}
	if a.wire(t.Context(), nil) != nil {
		t.Error("no error is one")
	}
}

func TestExecCollects(t *testing.T) {
	r := newRig(t, nil)
	r.create("a")
	exec := func(req *agentv1.ExecRequest) *agentv1.ExecResponse {
		t.Helper()
		req.SandboxId = "a"
		res, err := r.Exec(t.Context(), connect.NewRequest(req))
		if err != nil {
			t.Fatal(err)
		}
		return res.Msg
	}
	if m := exec(&agentv1.ExecRequest{Cmd: "echo", Args: []string{"x", "y"}, User: "joe"}); string(m.Stdout) != "xy" || m.ExitCode != 0 {
		t.Errorf("echo: %v", m)
	}
	if want := "Basic " + base64.StdEncoding.EncodeToString([]byte("joe:")); r.procs.users[0] != want {
		t.Errorf("as %q, want %q", r.procs.users[0], want)
	}
	if m := exec(&agentv1.ExecRequest{Cmd: "exit", Args: []string{"7"}}); m.ExitCode != 7 {
		t.Errorf("exit 7: %v", m)
	}
	input := strings.Repeat("0123456789", 30_000) // more than one message
	if m := exec(&agentv1.ExecRequest{Cmd: "cat", Stdin: []byte(input)}); string(m.Stdout) != input {
		t.Errorf("cat gives %d bytes of %d", len(m.Stdout), len(input))
	}
	_, err := r.Exec(t.Context(), connect.NewRequest(&agentv1.ExecRequest{SandboxId: "a", Cmd: "flood"}))
	if connect.CodeOf(err) != connect.CodeOutOfRange {
		t.Errorf("a command that prints without end: %v", err)
	}
}

// open begins a stream and returns it after its pid.
func (r *rig) open(start *agentv1.ExecStart) (*connect.BidiStreamForClient[agentv1.ExecStreamRequest, agentv1.ExecStreamResponse], uint32) {
	r.t.Helper()
	st := r.ExecStream(r.t.Context())
	r.t.Cleanup(func() { st.CloseRequest(); st.CloseResponse() })
	r.send(st, &agentv1.ExecStreamRequest{Message: &agentv1.ExecStreamRequest_Start{Start: start}})
	m, err := st.Receive()
	if err != nil || m.GetPid() == 0 {
		r.t.Fatalf("the stream begins with %v, %v", m, err)
	}
	return st, m.GetPid()
}

func (r *rig) send(st *connect.BidiStreamForClient[agentv1.ExecStreamRequest, agentv1.ExecStreamResponse], m *agentv1.ExecStreamRequest) {
	r.t.Helper()
	if err := st.Send(m); err != nil {
		r.t.Fatal(err)
	}
}

func stdin(s string) *agentv1.ExecStreamRequest {
	return &agentv1.ExecStreamRequest{Message: &agentv1.ExecStreamRequest_Stdin{Stdin: []byte(s)}}
}

func TestStreamsPassInputOutputAndTheEnd(t *testing.T) {
	r := newRig(t, nil)
	r.create("a")
	st, _ := r.open(&agentv1.ExecStart{SandboxId: "a", Cmd: "cat"})
	r.send(st, stdin("hello"))
	if m, err := st.Receive(); err != nil || string(m.GetStdout()) != "hello" {
		t.Errorf("%v, %v", m, err)
	}
	r.send(st, &agentv1.ExecStreamRequest{Message: &agentv1.ExecStreamRequest_CloseStdin{CloseStdin: true}})
	if m, err := st.Receive(); err != nil || m.GetExit() == nil || m.GetExit().ExitCode != 0 {
		t.Errorf("at the end of input: %v, %v", m, err)
	}
	if _, err := st.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after the exit: %v", err)
	}
	st, _ = r.open(&agentv1.ExecStart{SandboxId: "a", Cmd: "cat"})
	r.send(st, &agentv1.ExecStreamRequest{Message: &agentv1.ExecStreamRequest_Stop{Stop: true}})
	if m, err := st.Receive(); err != nil || m.GetExit().GetExitCode() != 128+15 || m.GetExit().GetError() != "signal: terminated" {
		t.Errorf("stopped: %v, %v", m, err)
	}
}

// TestARunningProcessIsPickedUp by its number, after whoever had it has gone.
func TestARunningProcessIsPickedUp(t *testing.T) {
	r := newRig(t, nil)
	r.create("a")
	first, pid := r.open(&agentv1.ExecStart{SandboxId: "a", Cmd: "cat"})
	first.CloseRequest()
	first.CloseResponse()
	again, same := r.open(&agentv1.ExecStart{SandboxId: "a", AttachPid: pid})
	if same != pid {
		t.Errorf("picked up %d, want %d", same, pid)
	}
	_ = again
	for what, start := range map[string]*agentv1.ExecStart{
		"no such process": {SandboxId: "a", AttachPid: 7},
		"and a command":   {SandboxId: "a", AttachPid: pid, Cmd: "echo"},
	} {
		st := r.ExecStream(t.Context())
		r.send(st, &agentv1.ExecStreamRequest{Message: &agentv1.ExecStreamRequest_Start{Start: start}})
		if _, err := st.Receive(); connect.CodeOf(err) != connect.CodeNotFound && connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", what, err)
		}
		st.CloseRequest()
		st.CloseResponse()
	}
}

func TestStreamsRefuseWhatIsNoStart(t *testing.T) {
	r := newRig(t, nil)
	r.create("a")
	for what, c := range map[string]struct {
		first *agentv1.ExecStreamRequest
		code  connect.Code
	}{
		"input first": {stdin("x"), connect.CodeInvalidArgument},
		"no sandbox":  {&agentv1.ExecStreamRequest{Message: &agentv1.ExecStreamRequest_Start{Start: &agentv1.ExecStart{SandboxId: "zz", Cmd: "cat"}}}, connect.CodeNotFound},
		"a terminal of no size": {&agentv1.ExecStreamRequest{Message: &agentv1.ExecStreamRequest_Start{
			Start: &agentv1.ExecStart{SandboxId: "a", Cmd: "cat", Pty: &agentv1.PtySize{}},
		}}, connect.CodeInvalidArgument},
	} {
		st := r.ExecStream(t.Context())
		r.send(st, c.first)
		if _, err := st.Receive(); connect.CodeOf(err) != c.code {
			t.Errorf("%s: %v, want %v", what, err, c.code)
		}
		st.CloseRequest()
		st.CloseResponse()
	}
}
