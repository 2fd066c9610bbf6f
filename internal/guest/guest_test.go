package guest

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/gen/filesystem/filesystemconnect"
	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
	"git.omukk.dev/wrenn/sandbox/internal/gen/process/processconnect"
)

const testToken = "test-token-0123456789"

// fakeSystem records instead of changing this machine, and fails on demand.
type fakeSystem struct {
	mu    sync.Mutex
	calls []string
	fail  map[string]error
	boot  string
}

func (f *fakeSystem) call(name, arg string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, name+" "+arg)
	return f.fail[name]
}

func (f *fakeSystem) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.calls
	f.calls = nil
	return c
}

func (f *fakeSystem) setFail(name string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = map[string]error{name: err}
}

func (f *fakeSystem) SetClock(t time.Time) error {
	return f.call("clock", strconv.FormatInt(t.UnixNano(), 10))
}
func (f *fakeSystem) AddEntropy(b []byte) error      { return f.call("entropy", strconv.Itoa(len(b))) }
func (f *fakeSystem) SetHostname(n string) error     { return f.call("hostname", n) }
func (f *fakeSystem) SetMachineID(id string) error   { return f.call("machine_id", id) }
func (f *fakeSystem) WriteGeneration(g string) error { return f.call("generation", g) }
func (f *fakeSystem) CloseConnections(port int) (int, error) {
	return 0, f.call("connections", strconv.Itoa(port))
}
func (f *fakeSystem) BootID() (string, error) { return f.boot, nil }
func (f *fakeSystem) Sync()                   { _ = f.call("sync", "") }

// agent is a server under test with a user of its own: whoever runs the test.
type agent struct {
	*Server
	sys  *fakeSystem
	http *httptest.Server
	home string
	now  time.Time
}

func newAgent(t *testing.T, change ...func(*Options)) *agent {
	t.Helper()
	dir := t.TempDir()
	home := filepath.Join(dir, "home")
	if err := os.Mkdir(home, 0o755); err != nil {
		t.Fatal(err)
	}
	id := strconv.Itoa(os.Getuid()) + ":" + strconv.Itoa(os.Getgid())
	passwd, group := filepath.Join(dir, "passwd"), filepath.Join(dir, "group")
	writeFile(t, passwd, "root:x:"+id+":root:/root:/bin/sh\nuser:x:"+id+":The User:"+home+":/bin/sh\nother:x:"+id+"::"+dir+":\n")
	writeFile(t, group, "users:x:"+strconv.Itoa(os.Getgid())+":\n")
	a := &agent{sys: &fakeSystem{boot: "boot-1"}, home: home, now: time.Unix(1_800_000_000, 0)}
	o := Options{
		Gateway: netip.MustParseAddr("127.0.0.1"), System: a.sys, RunDir: filepath.Join(dir, "run"),
		Passwd: passwd, Group: group, Logger: slog.New(slog.DiscardHandler),
		Now: func() time.Time { return a.now },
	}
	for _, f := range change {
		f(&o)
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	a.Server = s
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.http = &httptest.Server{Listener: l, Config: s.NewHTTP()}
	a.http.Start()
	t.Cleanup(func() {
		for _, p := range s.procs.list() {
			p.expire()
		}
		a.http.CloseClientConnections()
		a.http.Close()
		_ = s.Close()
	})
	return a
}

// confirmed is an agent that has had its first /init.
func confirmed(t *testing.T, change ...func(*Options)) *agent {
	t.Helper()
	a := newAgent(t, change...)
	if status, body := a.init(t, a.initBody(nil)); status != http.StatusOK {
		t.Fatalf("init: %d %s", status, body)
	}
	a.sys.take()
	return a
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (a *agent) initBody(change map[string]any) map[string]any {
	m := map[string]any{
		"generation": "gen-1", "access_token": testToken,
		"time_unix_nano": strconv.FormatInt(a.now.UnixNano(), 10),
		"entropy":        base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 64)),
	}
	for k, v := range change {
		m[k] = v
	}
	return m
}

func (a *agent) init(t *testing.T, body map[string]any) (int, string) {
	t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return a.do(t, "POST", "/init", bytes.NewReader(b))
}

// do makes a plain HTTP call; headers are pairs.
func (a *agent) do(t *testing.T, method, path string, body io.Reader, headers ...string) (int, string) {
	t.Helper()
	res := a.doRaw(t, method, path, body, headers...)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return res.StatusCode, string(b)
}

func (a *agent) doRaw(t *testing.T, method, path string, body io.Reader, headers ...string) *http.Response {
	t.Helper()
	req, err := http.NewRequest(method, a.http.URL+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	tr := &http.Transport{DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	res, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return res
}

// withToken adds the headers of every call.
type withToken struct{ token, user string }

func (w withToken) set(h http.Header) {
	if w.token != "" {
		h.Set(tokenHeader, w.token)
	}
	if w.user != "" {
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(w.user+":")))
	}
}

func (w withToken) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		w.set(r.Header())
		return next(ctx, r)
	}
}

func (w withToken) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, s connect.Spec) connect.StreamingClientConn {
		c := next(ctx, s)
		w.set(c.RequestHeader())
		return c
	}
}

func (w withToken) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

func (a *agent) httpClient() connect.HTTPClient { return a.http.Client() }

func (a *agent) processes(opts ...connect.ClientOption) processconnect.ProcessClient {
	return a.processesAs(withToken{token: testToken}, opts...)
}

func (a *agent) processesAs(w withToken, opts ...connect.ClientOption) processconnect.ProcessClient {
	opts = append([]connect.ClientOption{connect.WithInterceptors(w)}, opts...)
	return processconnect.NewProcessClient(a.httpClient(), a.http.URL, opts...)
}

func (a *agent) filesystem(opts ...connect.ClientOption) filesystemconnect.FilesystemClient {
	return a.filesystemAs(withToken{token: testToken}, opts...)
}

func (a *agent) filesystemAs(w withToken, opts ...connect.ClientOption) filesystemconnect.FilesystemClient {
	opts = append([]connect.ClientOption{connect.WithInterceptors(w)}, opts...)
	return filesystemconnect.NewFilesystemClient(a.httpClient(), a.http.URL, opts...)
}

// codecs runs a test in both encodings.
func codecs(t *testing.T, f func(t *testing.T, opts ...connect.ClientOption)) {
	t.Run("proto", func(t *testing.T) { f(t) })
	t.Run("json", func(t *testing.T) { f(t, connect.WithProtoJSON()) })
}

// run is what one command did, as its stream told it.
type run struct {
	pid                 uint32
	stdout, stderr, pty string
	events              []string
	end                 *pb.ProcessEvent_EndEvent
	err                 error
}

func (r *run) add(e *pb.ProcessEvent) {
	kind := ""
	switch x := e.GetEvent().(type) {
	case *pb.ProcessEvent_Start:
		kind, r.pid = "start", x.Start.GetPid()
	case *pb.ProcessEvent_Data:
		kind = "data"
		r.stdout += string(x.Data.GetStdout())
		r.stderr += string(x.Data.GetStderr())
		r.pty += string(x.Data.GetPty())
	case *pb.ProcessEvent_End:
		kind, r.end = "end", x.End
	case *pb.ProcessEvent_Keepalive:
		kind = "keepalive"
	}
	if !slices.Contains(r.events, kind) {
		r.events = append(r.events, kind)
	}
}

func sh(script string) *pb.StartRequest {
	return &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", script}}}
}

func runAll(t *testing.T, c processconnect.ProcessClient, req *connect.Request[pb.StartRequest]) *run {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return collect(ctx, c, req)
}

func collect(ctx context.Context, c processconnect.ProcessClient, req *connect.Request[pb.StartRequest]) *run {
	r := &run{}
	s, err := c.Start(ctx, req)
	if err != nil {
		r.err = err
		return r
	}
	defer s.Close()
	for s.Receive() {
		r.add(s.Msg().GetEvent())
	}
	r.err = s.Err()
	return r
}

// started is a stream whose start event has come.
func started(t *testing.T, ctx context.Context, c processconnect.ProcessClient, m *pb.StartRequest) (*connect.ServerStreamForClient[pb.StartResponse], uint32) {
	t.Helper()
	s, err := c.Start(ctx, connect.NewRequest(m))
	if err != nil {
		t.Fatal(err)
	}
	if !s.Receive() {
		t.Fatalf("no start event: %v", s.Err())
	}
	pid := s.Msg().GetEvent().GetStart().GetPid()
	if pid == 0 {
		t.Fatalf("first event is %v", s.Msg())
	}
	return s, pid
}

func byPID(pid uint32) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: pid}}
}

func byTag(tag string) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}
}

func wantCode(t *testing.T, err error, code connect.Code, text string) {
	t.Helper()
	if connect.CodeOf(err) != code || err == nil || !strings.Contains(err.Error(), text) {
		t.Fatalf("error is %v, want %v with %q", err, code, text)
	}
}

// eventually polls: what is waited for happens in another process, which tells
// nobody.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); <-tick.C {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

// errUnsupportedForTest is what a kernel without socket destruction answers.
var errUnsupportedForTest = errors.ErrUnsupported

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (a *agent) dial(t *testing.T) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", a.http.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
