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
	if d := time.Since(begin); d < 250*time.Millisecond || d > 50*time.Second {
		t.Errorf("ended after %v", d)
	}
	eventually(t, "the process is gone", func() bool { return len(a.procs.list()) == 0 })
}

// A limit outlives the client that set it.
func TestTimeoutAfterDisconnect(t *testing.T) {
	a := confirmed(t)
	var pid uint32
	for limit := time.Second; pid == 0; limit *= 2 { // a busy machine starts nothing within the first
		if limit > time.Minute {
			t.Fatal("the process does not start")
		}
		pid = startAndLeave(t, a, limit)
	}
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

// startAndLeave starts a process with a limit and goes away as soon as it runs;
// 0 when the limit passed before.
func startAndLeave(t *testing.T, a *agent, limit time.Duration) uint32 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	s, err := a.processes().Start(ctx, connect.NewRequest(sh("exec sleep 120")))
	if err != nil {
		wantCode(t, err, connect.CodeDeadlineExceeded, "")
		return 0
	}
	defer func() { cancel(); _ = s.Close() }()
	if !s.Receive() {
		wantCode(t, s.Err(), connect.CodeDeadlineExceeded, "")
		return 0
	}
	return s.Msg().GetEvent().GetStart().GetPid()
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
