package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/engine/enginetest"
	"git.omukk.dev/wrenn/sandbox/internal/httpapi"
	"git.omukk.dev/wrenn/sandbox/internal/logctx"
	"git.omukk.dev/wrenn/sandbox/internal/store"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// wholeStack is everything between HTTP and a host of fakes: API, control plane,
// database, the host agent behind its own calls, and the engine.
type wholeStack struct {
	t    *testing.T
	host *enginetest.Host
	url  string
	key  string
	log  *lines
}

// lines is a log in JSON.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// all returns what was logged until now.
func (l *lines) all(t *testing.T) []map[string]any {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []map[string]any
	for line := range strings.Lines(l.b.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("a line of the log is not JSON: %q", line)
		}
		out = append(out, m)
	}
	return out
}

func newWholeStack(t *testing.T, limits httpapi.Limits, fs storage.FS, change func(*enginetest.Host, *engine.Options)) *wholeStack {
	w := &wholeStack{t: t, host: enginetest.New(t), log: &lines{}}
	w.host.FS = fs
	log := slog.New(logctx.Handler(slog.NewJSONHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	w.host.Guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Error(w, "not here", http.StatusTeapot) })
	e := w.host.Start(func(o *engine.Options) {
		o.Logger = log
		if change != nil {
			change(w.host, o)
		}
	})
	mux := http.NewServeMux()
	mux.Handle(agentHandler(e, log))
	agent := httptest.NewUnstartedServer(mux)
	agent.EnableHTTP2 = true
	agent.StartTLS()
	t.Cleanup(agent.Close)
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	keyFile := filepath.Join(t.TempDir(), "api-key")
	if err := control.EnsureAPIKey(t.Context(), db, keyFile); err != nil {
		t.Fatal(err)
	}
	if w.key, err = keyIn(keyFile); err != nil {
		t.Fatal(err)
	}
	svc := control.New(control.Options{Store: db, Logger: log, Host: control.NewHost(agentClient(agent.Client(), agent.URL, nil))})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- svc.Run(ctx) }()
	srv := httptest.NewServer(httpapi.New(httpapi.Options{Service: svc, Logger: log, Limiter: httpapi.NewLimiter(limits)}))
	t.Cleanup(func() { srv.Close(); cancel(); <-ended })
	w.url = srv.URL
	if err := waitReady(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	return w
}

// ask sends a request and returns the answer and its body.
func (w *wholeStack) ask(method, path, body string, header ...string) (*http.Response, string) {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), method, w.url+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("X-API-Key", w.key)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp, string(b)
}

// create makes a sandbox and returns its ID.
func (w *wholeStack) create(header ...string) (id string, resp *http.Response) {
	w.t.Helper()
	resp, body := w.ask("POST", "/v1/sandboxes", `{"template":"base","memory_mb":128,"vcpus":1}`, header...)
	var sb struct{ ID string }
	if err := json.Unmarshal([]byte(body), &sb); err != nil || resp.StatusCode != http.StatusCreated || sb.ID == "" {
		w.t.Fatalf("create: %d %s", resp.StatusCode, body)
	}
	return sb.ID, resp
}

// refused checks that an answer is a refusal with a time, which names what is
// short.
func refused(t *testing.T, what string, resp *http.Response, body string, status int, code string, names ...string) {
	t.Helper()
	var e struct {
		Error struct{ Code, Message string }
	}
	if err := json.Unmarshal([]byte(body), &e); err != nil {
		t.Fatalf("%s: %s", what, body)
	}
	if after, err := strconv.Atoi(resp.Header.Get("Retry-After")); err != nil || after < 1 {
		t.Errorf("%s: Retry-After %q", what, resp.Header.Get("Retry-After"))
	}
	if resp.StatusCode != status || e.Error.Code != code {
		t.Errorf("%s: %d %s", what, resp.StatusCode, body)
	}
	for _, name := range names {
		if !strings.Contains(e.Error.Message, name) {
			t.Errorf("%s: %q does not name %q", what, e.Error.Message, name)
		}
	}
}

// fullStore is where snapshots are, on a disk that can be full.
type fullStore struct {
	storage.OS
	full *atomic.Bool
}

func (f fullStore) Create(name string) (storage.File, error) {
	if f.full.Load() {
		return nil, unix.ENOSPC
	}
	return f.OS.Create(name)
}

// TestNoRoomIsToldOverHTTP: whatever a host is short of, who asks for more gets
// 503, the time after which to ask again, and the name of what is short; and
// what runs is not touched.
func TestNoRoomIsToldOverHTTP(t *testing.T) {
	const create = `{"template":"base","memory_mb":128,"vcpus":1}`
	for name, c := range map[string]struct {
		change func(*enginetest.Host, *engine.Options)
		names  []string
	}{
		"memory": {func(_ *enginetest.Host, o *engine.Options) { o.MemoryLimitMB = 200 }, []string{"memory", "128 of 200 MiB", "--memory-limit"}},
		"CPU":    {func(_ *enginetest.Host, o *engine.Options) { o.VCPULimit = 1 }, []string{"CPU", "1 of 1", "--vcpu-limit"}},
		"slots":  {func(h *enginetest.Host, _ *engine.Options) { h.Network.Max = 1 }, []string{"network", "slots", "--network-prefix"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWholeStack(t, httpapi.Limits{}, nil, c.change)
			a, _ := w.create()
			resp, body := w.ask("POST", "/v1/sandboxes", create)
			refused(t, "create", resp, body, http.StatusServiceUnavailable, "host_unavailable", c.names...)
			resp, body = w.ask("POST", "/v1/sandboxes/"+a+"/fork", `{"count":1}`)
			if resp.StatusCode == http.StatusServiceUnavailable {
				refused(t, "fork", resp, body, http.StatusServiceUnavailable, "host_unavailable", c.names...)
			} else if !strings.Contains(body, c.names[0]) || !strings.Contains(body, "host_unavailable") {
				t.Errorf("fork: %d %s", resp.StatusCode, body)
			}
			if resp, body = w.ask("POST", "/v1/sandboxes/"+a+"/pause", ""); resp.StatusCode != http.StatusOK {
				t.Fatalf("pause: %d %s", resp.StatusCode, body)
			}
			w.create() // takes its place
			resp, body = w.ask("POST", "/v1/sandboxes/"+a+"/resume", "")
			refused(t, "resume", resp, body, http.StatusServiceUnavailable, "host_unavailable", c.names...)
			if _, body = w.ask("GET", "/v1/sandboxes/"+a, ""); !strings.Contains(body, `"status":"paused"`) {
				t.Errorf("after a refused resume: %s", body)
			}
		})
	}
	t.Run("disk below its low-water mark", func(t *testing.T) {
		var free atomic.Int64
		free.Store(1 << 30)
		w := newWholeStack(t, httpapi.Limits{}, nil, func(_ *enginetest.Host, o *engine.Options) {
			o.MinFreeDisk, o.DiskFree = 50<<20, func() (int64, error) { return free.Load(), nil }
		})
		a, _ := w.create()
		free.Store(49 << 20)
		for what, c := range map[string][2]string{
			"create": {"/v1/sandboxes", create}, "snapshot": {"/v1/snapshots", `{"sandbox_id":"` + a + `","name":"s"}`},
			"fork": {"/v1/sandboxes/" + a + "/fork", `{"count":1}`},
		} {
			resp, body := w.ask("POST", c[0], c[1])
			refused(t, what, resp, body, http.StatusServiceUnavailable, "host_unavailable", "disk", "49 MiB", "--min-free-disk")
		}
		if resp, body := w.ask("POST", "/v1/sandboxes/"+a+"/pause", ""); resp.StatusCode != http.StatusOK {
			t.Errorf("pause: %d %s", resp.StatusCode, body)
		}
		resp, body := w.ask("POST", "/v1/sandboxes/"+a+"/resume", "")
		refused(t, "resume", resp, body, http.StatusServiceUnavailable, "host_unavailable", "disk", "49 MiB")
	})
	t.Run("disk full", func(t *testing.T) {
		var full atomic.Bool
		w := newWholeStack(t, httpapi.Limits{}, fullStore{full: &full}, nil)
		a, _ := w.create()
		full.Store(true)
		for what, c := range map[string][2]string{
			"pause": {"/v1/sandboxes/" + a + "/pause", ""}, "snapshot": {"/v1/snapshots", `{"sandbox_id":"` + a + `","name":"s"}`},
		} {
			resp, body := w.ask("POST", c[0], c[1])
			refused(t, what, resp, body, http.StatusServiceUnavailable, "host_unavailable", "disk is full")
		}
		full.Store(false)
		if resp, body := w.ask("POST", "/v1/sandboxes/"+a+"/pause", ""); resp.StatusCode != http.StatusOK {
			t.Errorf("pause with room again: %d %s", resp.StatusCode, body)
		}
	})
}

// TestTooMuchOfOneKeyIsToldOverHTTP: by rate and by requests under way.
func TestTooMuchOfOneKeyIsToldOverHTTP(t *testing.T) {
	w := newWholeStack(t, httpapi.Limits{PerSecond: 0.001, Burst: 2, Concurrent: -1}, nil, nil)
	w.create()
	w.ask("GET", "/v1/sandboxes", "")
	resp, body := w.ask("GET", "/v1/sandboxes", "")
	refused(t, "rate", resp, body, http.StatusTooManyRequests, "rate_limited", "this API key", "requests a second")

	w = newWholeStack(t, httpapi.Limits{PerSecond: -1, Concurrent: 1}, nil, nil)
	held, release := make(chan struct{}), make(chan struct{})
	w.host.Guest = nil
	body1 := &heldBody{held: held, release: release}
	ended := make(chan struct{})
	// The body is asked for by the server, in a request that counts then.
	first := &http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Hour}}
	go func() {
		defer close(ended)
		req, _ := http.NewRequestWithContext(t.Context(), "POST", w.url+"/v1/sandboxes", body1)
		req.Header.Set("X-API-Key", w.key)
		req.Header.Set("Expect", "100-continue")
		if resp, err := first.Do(req); err == nil {
			resp.Body.Close()
		}
	}()
	<-held
	resp, body = w.ask("GET", "/v1/sandboxes", "")
	refused(t, "concurrency", resp, body, http.StatusTooManyRequests, "rate_limited", "this API key", "1 requests under way")
	close(release)
	<-ended
	if resp, body = w.ask("GET", "/v1/sandboxes", ""); resp.StatusCode != http.StatusOK {
		t.Errorf("when it has ended: %d %s", resp.StatusCode, body)
	}
}

// heldBody is a request's body that does not end until it is told to.
type heldBody struct {
	held, release chan struct{}
	once          sync.Once
}

func (b *heldBody) Read([]byte) (int, error) {
	b.once.Do(func() { close(b.held) })
	<-b.release
	return 0, io.EOF
}

func await(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	end := time.After(time.Minute)
	for !f() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("it does not come to pass that %s", what)
		}
	}
}

// TestLinesOfARequestHaveItsIDAndItsSandbox: in the control plane and, on the
// other side of a call, in the host agent; also when the caller names none.
func TestLinesOfARequestHaveItsIDAndItsSandbox(t *testing.T) {
	w := newWholeStack(t, httpapi.Limits{}, nil, nil)
	sandbox, _ := w.create()
	for what, c := range map[string]struct {
		header []string
		taken  bool
	}{
		"with an ID":         {[]string{"X-Request-Id", "from-the.caller_1"}, true},
		"without one":        {nil, false},
		"with an unsound ID": {[]string{"X-Request-Id", "two words"}, false},
	} {
		id, resp := w.create(c.header...)
		request := resp.Header.Get("X-Request-Id")
		if request == "" || c.taken != (len(c.header) == 2 && request == c.header[1]) {
			t.Errorf("%s: the answer has the ID %q", what, request)
		}
		for _, line := range []struct{ msg, key, value string }{
			{"operation", "operation", "create"}, {"host agent: call", "call", "CreateSandbox"},
		} {
			await(t, what+" there is a line "+line.msg, func() bool {
				for _, l := range w.log.all(t) {
					if l["msg"] == line.msg && l[line.key] == line.value && l["request_id"] == request && l["sandbox"] == id {
						return true
					}
				}
				return false
			})
		}
	}
	// A stream is marked too, and a failure is found by the request's ID.
	resp, _ := w.ask("POST", "/v1/sandboxes/"+sandbox+"/exec", `{"cmd":"true"}`, "X-Request-Id", "the-exec")
	if resp.StatusCode == http.StatusOK {
		t.Fatal("the guest of a fake ran something")
	}
	await(t, "the host agent's line of the exec", func() bool {
		for _, l := range w.log.all(t) {
			if l["msg"] == "host agent: call" && l["call"] == "Exec" && l["request_id"] == "the-exec" && l["sandbox"] == sandbox && l["err"] != nil {
				return true
			}
		}
		return false
	})
}
