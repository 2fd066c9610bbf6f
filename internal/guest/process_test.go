package guest

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
)

func TestStartRunsAsUser(t *testing.T) {
	a := confirmed(t)
	codecs(t, func(t *testing.T, opts ...connect.ClientOption) {
		m := sh(`echo "$HOME $USER $LOGNAME $PATH $A $(pwd)"; echo problem >&2; exit 3`)
		m.Process.Envs = map[string]string{"A": "b c"}
		r := runAll(t, a.processes(opts...), connect.NewRequest(m))
		want := fmt.Sprintf("%s user user %s b c %s\n", a.home, defaultPath, a.home)
		if r.err != nil || r.stdout != want || r.stderr != "problem\n" {
			t.Fatalf("err %v, stdout %q (want %q), stderr %q", r.err, r.stdout, want, r.stderr)
		}
		if r.events[0] != "start" || r.end.GetExitCode() != 3 || !r.end.GetExited() ||
			r.end.GetStatus() != "exit status 3" || r.end.GetError() != "exit status 3" {
			t.Fatalf("events %v, end %v", r.events, r.end)
		}
	})
}

// The names on the wire are the published SDKs'.
func TestStartWireJSON(t *testing.T) {
	a := confirmed(t)
	msg := `{"process":{"cmd":"/bin/sh","args":["-c","echo hi"],"envs":{},"cwd":"/"},"stdin":false}`
	body := string([]byte{0, 0, 0, 0, byte(len(msg))}) + msg
	status, got := a.do(t, "POST", "/process.Process/Start", strings.NewReader(body),
		"Content-Type", "application/connect+json", "Connect-Protocol-Version", "1", tokenHeader, testToken)
	if status != http.StatusOK {
		t.Fatalf("status %d: %s", status, got)
	}
	got = strings.ReplaceAll(got, ", ", ",") // the encoder's spaces vary
	for _, want := range []string{`{"event":{"start":{"pid":`, `{"event":{"data":{"stdout":"aGkK"}}}`,
		`{"event":{"end":{"exited":true,"status":"exit status 0"}}}`} {
		if !strings.Contains(got, want) {
			t.Errorf("%q lacks %s", got, want)
		}
	}
	if !strings.HasSuffix(got, "\x02\x00\x00\x00\x02{}") {
		t.Errorf("no end-of-stream frame in %q", got)
	}
}

func TestStartRefusals(t *testing.T) {
	a := confirmed(t)
	writeFile(t, filepath.Join(a.home, "plain"), "text")
	if err := os.WriteFile(filepath.Join(a.home, "broken"), []byte("#!/no/such/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cases := map[string]struct {
		change func(*pb.StartRequest)
		code   connect.Code
		text   string
	}{
		"no process":      {func(m *pb.StartRequest) { m.Process = nil }, connect.CodeInvalidArgument, "process: missing"},
		"no command":      {func(m *pb.StartRequest) { m.Process.Cmd = "" }, connect.CodeInvalidArgument, "process.cmd"},
		"not in PATH":     {func(m *pb.StartRequest) { m.Process.Cmd = "no-such-command" }, connect.CodeInvalidArgument, "'no-such-command' not found"},
		"no such file":    {func(m *pb.StartRequest) { m.Process.Cmd = "./none" }, connect.CodeInvalidArgument, "'./none' does not exist"},
		"not executable":  {func(m *pb.StartRequest) { m.Process.Cmd = "./plain" }, connect.CodePermissionDenied, "'./plain' is not executable"},
		"directory":       {func(m *pb.StartRequest) { m.Process.Cmd = "/" }, connect.CodePermissionDenied, "is a directory"},
		"no interpreter":  {func(m *pb.StartRequest) { m.Process.Cmd = "./broken" }, connect.CodeInvalidArgument, "starting './broken'"},
		"NUL in args":     {func(m *pb.StartRequest) { m.Process.Args[1] = "a\x00b" }, connect.CodeInvalidArgument, "process.args[1]"},
		"long argument":   {func(m *pb.StartRequest) { m.Process.Args[1] = strings.Repeat("a", maxString+1) }, connect.CodeInvalidArgument, "process.args[1]"},
		"many arguments":  {func(m *pb.StartRequest) { m.Process.Args = make([]string, maxArgs+1) }, connect.CodeInvalidArgument, "process.args"},
		"arguments' size": {func(m *pb.StartRequest) { m.Process.Args = bigArgs() }, connect.CodeInvalidArgument, "bytes are more than"},
		"bad env name":    {func(m *pb.StartRequest) { m.Process.Envs = map[string]string{"A=B": ""} }, connect.CodeInvalidArgument, "process.envs"},
		"NUL in env":      {func(m *pb.StartRequest) { m.Process.Envs = map[string]string{"A": "\x00"} }, connect.CodeInvalidArgument, "process.envs"},
		"missing cwd":     {func(m *pb.StartRequest) { m.Process.Cwd = proto.String("nowhere") }, connect.CodeInvalidArgument, "does not exist"},
		"cwd is a file":   {func(m *pb.StartRequest) { m.Process.Cwd = proto.String("plain") }, connect.CodeInvalidArgument, "is not a directory"},
		"NUL in cwd":      {func(m *pb.StartRequest) { m.Process.Cwd = proto.String("\x00") }, connect.CodeInvalidArgument, "process.cwd"},
		"empty tag":       {func(m *pb.StartRequest) { m.Tag = proto.String("") }, connect.CodeInvalidArgument, "tag"},
		"terminal size":   {func(m *pb.StartRequest) { m.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: 80}} }, connect.CodeInvalidArgument, "pty.size"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			m := sh("exit 0")
			tc.change(m)
			r := runAll(t, a.processes(), connect.NewRequest(m))
			wantCode(t, r.err, tc.code, tc.text)
			if len(r.events) > 0 {
				t.Errorf("events before the error: %v", r.events)
			}
		})
	}
	if n := len(a.procs.list()); n != 0 {
		t.Errorf("%d processes are left", n)
	}
}

func bigArgs() []string {
	args := make([]string, 16)
	for i := range args {
		args[i] = strings.Repeat("x", 100_000)
	}
	return args
}

func TestUsers(t *testing.T) {
	a := confirmed(t)
	as := func(user string) withToken { return withToken{token: testToken, user: user} }
	r := runAll(t, a.processesAs(as("other")), connect.NewRequest(sh("echo $USER $HOME $SHELL")))
	if want := "other " + filepath.Dir(a.home) + " /bin/sh\n"; r.stdout != want {
		t.Errorf("as other: %q, want %q (%v)", r.stdout, want, r.err)
	}
	for _, name := range []string{"ghost", "a:b", strings.Repeat("u", 200), "user\n"} {
		r := runAll(t, a.processesAs(as(name)), connect.NewRequest(sh("exit 0")))
		if name == "a:b" { // basic authentication ends the name at the colon
			name = "a"
		}
		wantCode(t, r.err, connect.CodeUnauthenticated, "invalid username: '"+clip(name)[:1])
	}
}

func TestDefaultUserFallsBackToRoot(t *testing.T) {
	a := confirmed(t, func(o *Options) {
		b, err := os.ReadFile(o.Passwd)
		if err != nil {
			t.Fatal(err)
		}
		root, _, _ := strings.Cut(string(b), "\n")
		writeFile(t, o.Passwd, root+"\n")
	})
	if r := runAll(t, a.processes(), connect.NewRequest(sh("echo $USER"))); r.stdout != "root\n" {
		t.Errorf("ran as %q (%v)", r.stdout, r.err)
	}
}

// A real change of credentials, where the test may make one.
func TestCredentials(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to become another user")
	}
	a := confirmed(t, func(o *Options) {
		writeFile(t, o.Passwd, "user:x:12345:12346::/:/bin/sh\n")
		writeFile(t, o.Group, "user:x:12346:\nextra:x:12347:someone,user\n")
	})
	r := runAll(t, a.processes(), connect.NewRequest(sh("id -u; id -G; echo through >/dev/stdout; tty || true")))
	if !strings.HasPrefix(r.stdout, "12345\n12346 12347\nthrough\n") {
		t.Errorf("stdout %q, stderr %q, %v", r.stdout, r.stderr, r.err)
	}
	m := sh("test -O $(tty) && echo mine")
	m.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: 80, Rows: 24}}
	if r := runAll(t, a.processes(), connect.NewRequest(m)); r.pty != "mine\r\n" {
		t.Errorf("terminal: %q %v", r.pty, r.err)
	}
}

func TestStdin(t *testing.T) {
	a := confirmed(t)
	codecs(t, func(t *testing.T, opts ...connect.ClientOption) {
		c := a.processes(opts...)
		ctx := t.Context()
		s, pid := started(t, ctx, c, &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat"}, Tag: proto.String("my cat")})
		defer s.Close()
		in := func(text string) *pb.ProcessInput {
			return &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(text)}}
		}
		if _, err := c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in("one ")})); err != nil {
			t.Fatal(err)
		}
		st := c.StreamInput(ctx)
		for _, m := range []*pb.StreamInputRequest{
			{Event: &pb.StreamInputRequest_Start{Start: &pb.StreamInputRequest_StartEvent{Process: byTag("my cat")}}},
			{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: in("two ")}}},
			{Event: &pb.StreamInputRequest_Keepalive{Keepalive: &pb.StreamInputRequest_KeepAlive{}}},
			{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: in("three")}}},
		} {
			if err := st.Send(m); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := st.CloseAndReceive(); err != nil {
			t.Fatal(err)
		}
		list, err := c.List(ctx, connect.NewRequest(&pb.ListRequest{}))
		if err != nil || len(list.Msg.GetProcesses()) != 1 || list.Msg.GetProcesses()[0].GetTag() != "my cat" ||
			list.Msg.GetProcesses()[0].GetConfig().GetCmd() != "cat" || list.Msg.GetProcesses()[0].GetPid() != pid {
			t.Fatalf("list: %v %v", list, err)
		}
		if _, err := c.CloseStdin(ctx, connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(pid)})); err != nil {
			t.Fatal(err)
		}
		r := &run{}
		for s.Receive() {
			r.add(s.Msg().GetEvent())
		}
		if r.stdout != "one two three" || r.end.GetExitCode() != 0 || s.Err() != nil {
			t.Fatalf("%q %v %v", r.stdout, r.end, s.Err())
		}
		_, err = c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in("late")}))
		wantCode(t, err, connect.CodeNotFound, fmt.Sprint(pid))
	})
}

func TestInputRefusals(t *testing.T) {
	a := confirmed(t)
	c, ctx := a.processes(), t.Context()
	m := sh("exec sleep 60")
	m.Stdin = proto.Bool(false)
	s, pid := started(t, ctx, c, m)
	defer s.Close()
	send := func(p *pb.ProcessSelector, in *pb.ProcessInput) error {
		_, err := c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: p, Input: in}))
		return err
	}
	stdin := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("x")}}
	wantCode(t, send(byPID(pid), stdin), connect.CodeFailedPrecondition, "without an input")
	wantCode(t, send(byPID(pid), &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("x")}}), connect.CodeFailedPrecondition, "no terminal")
	wantCode(t, send(byPID(pid), nil), connect.CodeInvalidArgument, "input")
	wantCode(t, send(nil, stdin), connect.CodeInvalidArgument, "pid or tag")
	wantCode(t, send(byTag("nobody"), stdin), connect.CodeNotFound, "nobody")
	_, err := c.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byPID(pid), Pty: &pb.PTY{}}))
	wantCode(t, err, connect.CodeFailedPrecondition, "no terminal")
	_, err = c.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: byPID(pid)}))
	wantCode(t, err, connect.CodeInvalidArgument, "signal")
	_, err = c.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: byPID(4_000_000), Signal: pb.Signal_SIGNAL_SIGKILL}))
	wantCode(t, err, connect.CodeNotFound, "4000000")
	st := c.StreamInput(ctx)
	if err := st.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: stdin}}}); err != nil {
		t.Fatal(err)
	}
	_, err = st.CloseAndReceive()
	wantCode(t, err, connect.CodeInvalidArgument, "first message")
}

// Input that a process does not read waits, and the caller's limit ends it.
func TestInputBlocks(t *testing.T) {
	a := confirmed(t)
	c := a.processes()
	s, pid := started(t, t.Context(), c, sh("exec sleep 60"))
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	big := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: make([]byte, 1<<20)}}
	_, err := c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: big}))
	wantCode(t, err, connect.CodeDeadlineExceeded, "")
	p, err := a.procs.find(byPID(pid), false)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the writer gives up its turn", func() bool { return len(p.in.turn) == 1 })
}

func TestSignals(t *testing.T) {
	a := confirmed(t)
	c, ctx := a.processes(), t.Context()
	for sig, want := range map[pb.Signal]string{pb.Signal_SIGNAL_SIGTERM: "signal: terminated", pb.Signal_SIGNAL_SIGKILL: "signal: killed"} {
		// The child must go with its parent.
		s, pid := started(t, ctx, c, sh("sleep 60 & echo $!; wait"))
		if !s.Receive() {
			t.Fatal(s.Err())
		}
		child, err := strconv.Atoi(strings.TrimSpace(string(s.Msg().GetEvent().GetData().GetStdout())))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: byPID(pid), Signal: sig})); err != nil {
			t.Fatal(err)
		}
		r := &run{}
		for s.Receive() {
			r.add(s.Msg().GetEvent())
		}
		if r.end.GetStatus() != want || r.end.GetError() != want || r.end.GetExited() || r.end.GetExitCode() != -1 {
			t.Errorf("end %v, want %s", r.end, want)
		}
		eventually(t, "the child is dead", func() bool { return !alive(child) })
	}
}

// alive tells whether a process exists and is no zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	return !strings.Contains(string(b), ") Z ")
}

func TestTimeoutIsLifetime(t *testing.T) {
	a := confirmed(t)
	// The header itself: a Go client's own deadline would hide the answer.
	msg := `{"process":{"cmd":"/bin/sh","args":["-c","echo up; exec sleep 60"]}}`
	body := string([]byte{0, 0, 0, 0, byte(len(msg))}) + msg
	begin := time.Now()
	_, got := a.do(t, "POST", "/process.Process/Start", strings.NewReader(body), "Content-Type", "application/connect+json",
		"Connect-Protocol-Version", "1", "Connect-Timeout-Ms", "300", tokenHeader, testToken)
	if !strings.Contains(got, `"code":"deadline_exceeded"`) || strings.Contains(got, `"end"`) {
		t.Errorf("answer %q", got)
	}
	if d := time.Since(begin); d < 250*time.Millisecond || d > 20*time.Second {
		t.Errorf("ended after %v", d)
	}
	eventually(t, "the process is gone", func() bool { return len(a.procs.list()) == 0 })
}

// A limit outlives the client that set it.
func TestTimeoutAfterDisconnect(t *testing.T) {
	a := confirmed(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	s, pid := started(t, ctx, a.processes(), sh("exec sleep 60"))
	cancel()
	_ = s.Close()
	eventually(t, "the process is gone", func() bool { return !alive(int(pid)) })
	// Who asks for it later hears why.
	eventually(t, "it is retired", func() bool { return len(a.procs.list()) == 0 })
	cs, err := a.processes().Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
	if err != nil {
		t.Fatal(err)
	}
	for cs.Receive() {
	}
	wantCode(t, cs.Err(), connect.CodeDeadlineExceeded, "time limit")
}

func readers(a *agent, pid uint32) int {
	p, err := a.procs.find(byPID(pid), true)
	if err != nil {
		return -1
	}
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	return len(p.out.readers)
}

func TestDisconnectAndConnectAgain(t *testing.T) {
	a := confirmed(t)
	codecs(t, func(t *testing.T, opts ...connect.ClientOption) {
		c := a.processes(opts...)
		ctx, cancel := context.WithCancel(t.Context())
		s, pid := started(t, ctx, c, sh("echo first; read x; echo $x; read y; echo last; exit 5"))
		if !s.Receive() || string(s.Msg().GetEvent().GetData().GetStdout()) != "first\n" {
			t.Fatalf("%v %v", s.Msg(), s.Err())
		}
		cancel()
		_ = s.Close()
		eventually(t, "the client is gone", func() bool { return readers(a, pid) == 0 })
		send := func(text string) {
			t.Helper()
			in := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(text)}}
			if _, err := c.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
				t.Fatal(err)
			}
		}
		send("while nobody looked\n")
		eventually(t, "the output is there", func() bool {
			p, _ := a.procs.find(byPID(pid), false)
			p.out.mu.Lock()
			defer p.out.mu.Unlock()
			return len(p.out.pieces) > 0
		})
		cs, err := c.Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
		if err != nil {
			t.Fatal(err)
		}
		r := &run{}
		for cs.Receive() {
			r.add(cs.Msg().GetEvent())
			if r.stdout == "while nobody looked\n" && r.end == nil {
				send("go\n")
				r.stdout = ""
			}
		}
		if cs.Err() != nil || r.pid != pid || r.events[0] != "start" || r.stdout != "last\n" || r.end.GetExitCode() != 5 {
			t.Fatalf("%+v %v", r, cs.Err())
		}
		// Its end has been told: now it is unknown.
		cs, err = c.Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
		if err == nil {
			for cs.Receive() {
			}
			err = cs.Err()
		}
		wantCode(t, err, connect.CodeNotFound, "not found")
	})
}

// While nobody is attached a process runs on; what is kept is bounded and is
// the newest.
func TestDetachedOutputIsBounded(t *testing.T) {
	a := confirmed(t)
	ctx, cancel := context.WithCancel(t.Context())
	s, pid := started(t, ctx, a.processes(), sh("read x; head -c 8000000 /dev/zero; echo the end"))
	p, err := a.procs.find(byPID(pid), false)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	_ = s.Close()
	eventually(t, "the client is gone", func() bool { return readers(a, pid) == 0 })
	in := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("\n")}}
	if _, err := a.processes().SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it ends", func() bool { return len(a.procs.list()) == 0 })
	if p.out.size > outputLimit {
		t.Errorf("%d bytes are kept", p.out.size)
	}
	cs, err := a.processes().Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
	if err != nil {
		t.Fatal(err)
	}
	r := &run{}
	for cs.Receive() {
		r.add(cs.Msg().GetEvent())
	}
	if !strings.HasSuffix(r.stdout, "the end\n") || len(r.stdout) < outputLimit/2 || r.end == nil || r.end.GetExitCode() != 0 {
		t.Errorf("%d bytes, end %v, %v", len(r.stdout), r.end, cs.Err())
	}
}

// 64 MiB through one stream, in bounded memory and complete; the client is
// slower than the process.
func TestBigOutput(t *testing.T) {
	a := confirmed(t)
	const size = 64 << 20
	s, err := a.processes().Start(t.Context(), connect.NewRequest(sh(fmt.Sprintf("head -c %d /dev/zero", size))))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var total, peak, n int
	var code int32 = -1
	for s.Receive() {
		e := s.Msg().GetEvent()
		total += len(e.GetData().GetStdout())
		if e.GetEnd() != nil {
			code = e.GetEnd().GetExitCode()
		}
		if n++; n%256 == 0 {
			if ps := a.procs.list(); len(ps) == 1 {
				ps[0].out.mu.Lock()
				peak = max(peak, ps[0].out.size)
				ps[0].out.mu.Unlock()
			}
		}
	}
	if s.Err() != nil || total != size || code != 0 {
		t.Fatalf("%d bytes, exit code %d, %v", total, code, s.Err())
	}
	if peak > outputLimit {
		t.Errorf("%d bytes were held", peak)
	}
}

// A server left behind by a command neither holds the end of it up nor dies of
// its closed output.
func TestBackgroundChild(t *testing.T) {
	a := confirmed(t)
	mark := filepath.Join(a.home, "mark")
	begin := time.Now()
	r := runAll(t, a.processes(), connect.NewRequest(sh("(while ! test -e "+mark+"; do sleep 0.05; done; echo one; echo two; echo done >"+mark+") & echo started $!")))
	if r.err != nil || !strings.HasPrefix(r.stdout, "started ") || r.end.GetExitCode() != 0 {
		t.Fatalf("%+v", r)
	}
	if d := time.Since(begin); d > 15*time.Second {
		t.Errorf("the end took %v", d)
	}
	writeFile(t, mark, "go")
	eventually(t, "the child could write", func() bool {
		b, _ := os.ReadFile(mark)
		return string(b) == "done\n"
	})
}

func TestPTY(t *testing.T) {
	a := confirmed(t)
	c, ctx := a.processes(), t.Context()
	m := sh("stty size; stty -echo; echo ready; read line; stty size; echo got $line; exit 4")
	m.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: 100, Rows: 30}}
	s, pid := started(t, ctx, c, m)
	defer s.Close()
	r := &run{}
	for !strings.Contains(r.pty, "ready") && s.Receive() {
		r.add(s.Msg().GetEvent())
	}
	if !strings.HasPrefix(r.pty, "30 100\r\n") {
		t.Fatalf("%q %v", r.pty, s.Err())
	}
	size := &pb.PTY{Size: &pb.PTY_Size{Cols: 120, Rows: 40}}
	if _, err := c.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byPID(pid), Pty: size})); err != nil {
		t.Fatal(err)
	}
	_, err := c.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byPID(pid), Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 1 << 20, Rows: 1}}}))
	wantCode(t, err, connect.CodeInvalidArgument, "pty.size")
	_, err = c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("x")}}}))
	wantCode(t, err, connect.CodeFailedPrecondition, "send pty")
	in := &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("it\n")}}
	if _, err := c.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
		t.Fatal(err)
	}
	for s.Receive() {
		r.add(s.Msg().GetEvent())
	}
	if !strings.HasSuffix(r.pty, "40 120\r\ngot it\r\n") || r.stdout != "" || r.end.GetExitCode() != 4 {
		t.Errorf("%q %v %v", r.pty, r.end, s.Err())
	}
}

// The end of input of a terminal ends a program that reads it.
func TestPTYCloseStdin(t *testing.T) {
	a := confirmed(t)
	c, ctx := a.processes(), t.Context()
	m := &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat"}, Pty: &pb.PTY{}}
	s, pid := started(t, ctx, c, m)
	defer s.Close()
	if _, err := c.CloseStdin(ctx, connect.NewRequest(&pb.CloseStdinRequest{Process: byPID(pid)})); err != nil {
		t.Fatal(err)
	}
	r := &run{}
	for s.Receive() {
		r.add(s.Msg().GetEvent())
	}
	if r.end == nil || r.end.GetExitCode() != 0 {
		t.Errorf("%v %v", r.end, s.Err())
	}
}

func TestKeepalive(t *testing.T) {
	a := confirmed(t)
	req := connect.NewRequest(sh("sleep 1.3"))
	req.Header().Set(keepaliveHeader, "1")
	r := runAll(t, a.processes(), req)
	if r.err != nil || strings.Join(r.events, " ") != "start keepalive end" {
		t.Errorf("%v %v", r.events, r.err)
	}
	req = connect.NewRequest(sh("exit 0"))
	req.Header().Set(keepaliveHeader, "soon")
	wantCode(t, runAll(t, a.processes(), req).err, connect.CodeInvalidArgument, keepaliveHeader)
}

// Two clients of one process both get all of it.
func TestTwoClients(t *testing.T) {
	a := confirmed(t)
	c := a.processes()
	s, pid := started(t, t.Context(), c, sh("read x; seq 1 20000"))
	defer s.Close()
	cs, err := c.Connect(t.Context(), connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)}))
	if err != nil || !cs.Receive() {
		t.Fatalf("%v %v", err, cs.Err())
	}
	defer cs.Close()
	in := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("\n")}}
	if _, err := c.SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	got := make([]run, 2)
	wg.Go(func() {
		for s.Receive() {
			got[0].add(s.Msg().GetEvent())
		}
	})
	wg.Go(func() {
		for cs.Receive() {
			got[1].add(cs.Msg().GetEvent())
		}
	})
	wg.Wait()
	for i, r := range got {
		if len(r.stdout) != 108894 || !strings.HasSuffix(r.stdout, "\n20000\n") || r.end == nil {
			t.Errorf("client %d: %d bytes, end %v", i, len(r.stdout), r.end)
		}
	}
}

func TestHundredInParallel(t *testing.T) {
	a := confirmed(t)
	before := runtime.NumGoroutine()
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			r := collect(t.Context(), a.processes(), connect.NewRequest(sh(fmt.Sprintf("echo %d; exit %d", i, i))))
			if r.err != nil || r.stdout != fmt.Sprintf("%d\n", i) || int(r.end.GetExitCode()) != i {
				t.Errorf("%d: %q %v %v", i, r.stdout, r.end, r.err)
			}
		})
	}
	wg.Wait()
	if n := len(a.procs.list()); n != 0 {
		t.Errorf("%d processes are left", n)
	}
	a.http.Client().CloseIdleConnections()
	eventually(t, "the goroutines are gone", func() bool { return runtime.NumGoroutine() <= before+4 })
}

func TestEndedAreBounded(t *testing.T) {
	ps := newProcesses()
	for i := range maxEnded + 10 {
		ps.retire(&proc{pid: i + 1})
	}
	if len(ps.ended) != maxEnded || ps.ended[0].pid != 11 {
		t.Errorf("%d are kept, the first is %d", len(ps.ended), ps.ended[0].pid)
	}
}

func TestFindProgram(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"a/tool": 0o644, "b/tool": 0o755, "here": 0o755} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	path := dir + "/a:" + dir + "/b"
	for _, tc := range []struct{ name, path, want string }{
		{"tool", path, dir + "/b/tool"}, // what cannot be run is passed over
		{"./here", "", dir + "/here"},
		{"here", ":/bin", dir + "/here"}, // the empty element is the working directory
		{"tool", "b", dir + "/b/tool"},
	} {
		if got, err := findProgram(tc.name, tc.path, dir); err != nil || got != tc.want {
			t.Errorf("%s in %q: %q %v, want %q", tc.name, tc.path, got, err, tc.want)
		}
	}
	_, err := findProgram("tool", dir+"/a", dir)
	wantCode(t, err, connect.CodePermissionDenied, "not executable")
}
