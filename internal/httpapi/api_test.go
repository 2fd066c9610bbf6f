package httpapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
	"git.omukk.dev/wrenn/sandbox/internal/httpapi"
	"git.omukk.dev/wrenn/sandbox/internal/store"
)

type server struct {
	*httptest.Server
	svc     *control.Service
	host    *controltest.Host
	store   *store.DB
	path    string // of the store's file
	key     string
	log     *slog.Logger
	metrics *httpapi.Metrics
	doc     routers.Router
	// answered has every "METHOD path status" of the document that was seen.
	answered map[string]bool
}

func setup(t *testing.T) *server {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wrenn.db")
	db, err := store.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	s := &server{host: controltest.NewHost(), store: db, path: path, answered: map[string]bool{}}
	metrics := httpapi.NewMetrics()
	s.svc = control.New(control.Options{Store: db, Host: s.host, Logger: log, Observe: metrics.ObserveOperation})
	key, row := control.NewAPIKey("test")
	s.key = key
	if err := db.CreateAPIKey(t.Context(), row); err != nil {
		t.Fatal(err)
	}
	if _, err := s.svc.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.log, s.metrics = log, metrics
	s.serve(t, httpapi.Limits{})
	s.doc = document(t)
	return s
}

// serve makes the server anew, with limits.
func (s *server) serve(t *testing.T, l httpapi.Limits) {
	t.Helper()
	s.Server = httptest.NewServer(httpapi.New(httpapi.Options{Service: s.svc, Logger: s.log, Metrics: s.metrics, Limiter: httpapi.NewLimiter(l)}))
	t.Cleanup(s.Close)
}

// loadDocument reads and validates openapi.yaml once for all tests, which only
// read it.
var loadDocument = sync.OnceValues(func() (*openapi3.T, error) {
	doc, err := openapi3.NewLoader().LoadFromFile("openapi.yaml")
	if err != nil {
		return nil, err
	}
	doc.Servers = nil
	return doc, doc.Validate(context.Background())
})

var loadRouter = sync.OnceValues(func() (routers.Router, error) {
	doc, err := loadDocument()
	if err != nil {
		return nil, err
	}
	return gorillamux.NewRouter(doc)
})

func document(t *testing.T) routers.Router {
	t.Helper()
	r, err := loadRouter()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) decode(t *testing.T, v any) {
	t.Helper()
	if err := json.Unmarshal(a.body, v); err != nil {
		t.Fatalf("%v in %s", err, a.body)
	}
}

func (a answer) code(t *testing.T) (code, message string) {
	t.Helper()
	var e struct {
		Error struct{ Code, Message string }
	}
	a.decode(t, &e)
	return e.Error.Code, e.Error.Message
}

// call sends a request with the key. body: nil, string, []byte or a value for
// JSON. The answer is checked against the document, and so is the request when
// it was accepted.
func (s *server) call(t *testing.T, method, path string, body any) answer {
	t.Helper()
	var b []byte
	contentType := "application/json"
	switch v := body.(type) {
	case nil:
	case string:
		b = []byte(v)
	case []byte:
		b, contentType = v, "application/octet-stream"
	default:
		var err error
		if b, err = json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", s.key)
	if body != nil {
		req.Header.Set("Content-Type", contentType)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	a := answer{status: res.StatusCode, header: res.Header}
	if a.body, err = io.ReadAll(res.Body); err != nil {
		t.Fatal(err)
	}
	s.validate(t, req, b, a)
	return a
}

func (s *server) validate(t *testing.T, req *http.Request, body []byte, a answer) {
	t.Helper()
	req.Body = io.NopCloser(bytes.NewReader(body))
	req.URL.Host, req.URL.Scheme, req.Host = "", "", ""
	route, params, err := s.doc.FindRoute(req)
	if err != nil {
		if a.status < 400 {
			t.Errorf("%s %s is not in the document: %v", req.Method, req.URL.Path, err)
		}
		return
	}
	s.answered[req.Method+" "+route.Path] = true
	in := &openapi3filter.RequestValidationInput{
		Request: req, PathParams: params, Route: route,
		Options: &openapi3filter.Options{
			AuthenticationFunc:    openapi3filter.NoopAuthenticationFunc,
			IncludeResponseStatus: true,
			// The pairs of metadata.<key> are no form the validator knows.
			ExcludeRequestQueryParams: strings.Contains(req.URL.RawQuery, "metadata."),
		},
	}
	if a.status < 300 {
		if err := openapi3filter.ValidateRequest(context.Background(), in); err != nil {
			t.Errorf("%s %s was accepted but is not as the document says: %v", req.Method, req.URL, err)
		}
	}
	out := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: a.status, Header: a.header,
		Body: io.NopCloser(bytes.NewReader(a.body)), Options: in.Options,
	}
	if err := openapi3filter.ValidateResponse(context.Background(), out); err != nil {
		t.Errorf("%s %s answered %d %s: %v", req.Method, req.URL, a.status, a.body, err)
	}
}

func (s *server) want(t *testing.T, method, path string, body any, status int) answer {
	t.Helper()
	a := s.call(t, method, path, body)
	if a.status != status {
		t.Fatalf("%s %s: %d %s; want %d", method, path, a.status, a.body, status)
	}
	return a
}

// sandbox is what the tests look at.
type sandbox struct {
	ID, Status, Template string
	VCPUs                int    `json:"vcpus"`
	MemoryMB             int    `json:"memory_mb"`
	LastActiveAt         string `json:"last_active_at"`
	ExpiresAt            string `json:"expires_at"`
	Metadata             map[string]string
}

func (s *server) create(t *testing.T, body any) sandbox {
	t.Helper()
	var sb sandbox
	s.want(t, "POST", "/v1/sandboxes", body, 201).decode(t, &sb)
	return sb
}

type m = map[string]any

func init() {
	openapi3filter.RegisterBodyDecoder("application/yaml", func(r io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		b, err := io.ReadAll(r)
		return string(b), err
	})
}

// TestEveryRoute drives every operation of the document.
func TestEveryRoute(t *testing.T) {
	t.Parallel()
	s := setup(t)
	s.want(t, "GET", "/healthz", nil, 200)
	s.want(t, "GET", "/readyz", nil, 200)
	file, err := os.ReadFile("openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if served := s.want(t, "GET", "/openapi.yaml", nil, 200); !bytes.Equal(served.body, file) {
		t.Error("the document served is not the file")
	}

	sb := s.create(t, m{"template": "base", "vcpus": 2, "memory_mb": 256, "timeout_sec": 600, "auto_pause": true,
		"metadata": m{"team": "red", "x": "1"}, "envs": m{"A": "b"}})
	if sb.Status != "running" || sb.VCPUs != 2 || sb.MemoryMB != 256 || sb.ExpiresAt == "" || sb.Metadata["team"] != "red" {
		t.Fatalf("%+v", sb)
	}
	p := "/v1/sandboxes/" + sb.ID
	s.want(t, "GET", p, nil, 200)
	var list struct{ Sandboxes []sandbox }
	for q, n := range map[string]int{
		"": 1, "?status=running": 1, "?status=paused,error": 0, "?metadata.team=red&metadata.x=1": 1, "?metadata.team=blue": 0,
	} {
		s.want(t, "GET", "/v1/sandboxes"+q, nil, 200).decode(t, &list)
		if len(list.Sandboxes) != n {
			t.Errorf("%q lists %d; want %d", q, len(list.Sandboxes), n)
		}
	}

	s.want(t, "POST", p+"/exec", m{"cmd": "echo", "args": []string{"hi"}, "cwd": "/", "user": "root", "timeout_sec": 5}, 200)
	s.want(t, "PUT", p+"/files?path=/a/b&mode=755&user=root", []byte("hello"), 200)
	got := s.want(t, "GET", p+"/files?path=/a/b", nil, 200)
	if string(got.body) != "hello" || got.header.Get("X-File-Mode") != "755" || got.header.Get("Content-Length") != "5" {
		t.Errorf("%q %v", got.body, got.header)
	}
	s.want(t, "GET", p+"/files/list?path=/a&depth=2", nil, 200)
	s.want(t, "POST", p+"/files/mkdir?path=/a/c", nil, 201)
	s.want(t, "DELETE", p+"/files?path=/a/b", nil, 204)
	s.want(t, "GET", p+"/files?path=/a/b", nil, 404)
	s.want(t, "GET", p+"/metrics", nil, 200)
	s.want(t, "GET", p+"/events", nil, 200)
	s.want(t, "POST", p+"/timeout", m{"timeout_sec": 0}, 200).decode(t, &sb)

	s.want(t, "POST", "/v1/snapshots", m{"sandbox_id": sb.ID, "name": "warm-1"}, 201)
	s.want(t, "GET", "/v1/snapshots?type=snapshot", nil, 200)
	s.want(t, "GET", "/v1/snapshots/warm-1", nil, 200)
	if c := s.create(t, m{"template": "warm-1"}); c.VCPUs != 2 || c.MemoryMB != 256 {
		t.Errorf("%+v", c)
	}
	s.want(t, "DELETE", "/v1/snapshots/warm-1", nil, 204)
	s.want(t, "POST", "/v1/store/gc", m{"dry_run": true}, 200)

	s.want(t, "POST", p+"/fork", m{"count": 2}, 201).decode(t, &list)
	if len(list.Sandboxes) != 2 {
		t.Errorf("%d children", len(list.Sandboxes))
	}
	s.want(t, "POST", p+"/pause", nil, 200)
	s.want(t, "POST", p+"/exec", m{"cmd": "echo"}, 409)
	s.want(t, "POST", p+"/resume", m{}, 200)
	s.want(t, "GET", p+"/exec/stream", nil, 400)
	s.want(t, "GET", p+"/pty", nil, 400)
	s.want(t, "DELETE", p, nil, 204)
	s.want(t, "GET", p, nil, 404)

	text := string(s.want(t, "GET", "/metrics", nil, 200).body)
	for _, line := range []string{
		`wrenn_sandboxes{status="running"} 3`,
		`wrenn_operation_duration_seconds_count{code="ok",operation="pause"} 1`,
		`wrenn_http_request_duration_seconds_count{method="DELETE",route="/v1/sandboxes/{id}",status="204"} 1`,
	} {
		if !strings.Contains(text, line) {
			t.Errorf("/metrics has no %s", line)
		}
	}
	s.everyOperationAnswered(t)
}

func (s *server) everyOperationAnswered(t *testing.T) {
	t.Helper()
	doc, err := loadDocument()
	if err != nil {
		t.Fatal(err)
	}
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			if !s.answered[method+" "+path] {
				t.Errorf("%s %s was not driven", method, path)
			}
		}
	}
}

func TestExecResult(t *testing.T) {
	t.Parallel()
	s := setup(t)
	p := "/v1/sandboxes/" + s.create(t, m{}).ID
	for _, c := range []struct {
		body m
		want string
	}{
		{m{"cmd": "exit", "args": []string{"0"}}, `{"stdout":"","stderr":"","exit_code":0,"duration_ms":1,"encoding":"utf-8"}`},
		{m{"cmd": "exit", "args": []string{"7"}}, `{"stdout":"","stderr":"","exit_code":7,"duration_ms":1,"encoding":"utf-8"}`},
		{m{"cmd": "fail", "args": []string{"<é>"}}, `{"stdout":"","stderr":"<é>","exit_code":1,"duration_ms":1,"encoding":"utf-8"}`},
		{m{"cmd": "bytes"}, `{"stdout":"/wD+","stderr":"","exit_code":0,"duration_ms":1,"encoding":"base64"}`},
		{m{"cmd": "cat", "stdin": "in"}, `{"stdout":"in","stderr":"","exit_code":0,"duration_ms":1,"encoding":"utf-8"}`},
		{m{"cmd": "cat", "stdin": "/wD+", "encoding": "base64"}, `{"stdout":"/wD+","stderr":"","exit_code":0,"duration_ms":1,"encoding":"base64"}`},
	} {
		a := s.want(t, "POST", p+"/exec", c.body, 200)
		if got := strings.TrimSpace(string(a.body)); got != c.want {
			t.Errorf("%v: %s; want %s", c.body, got, c.want)
		}
	}
}

func TestPages(t *testing.T) {
	t.Parallel()
	s := setup(t)
	var names []string
	for range 5 {
		names = append(names, s.create(t, m{}).ID)
	}
	var got []string
	cursor := ""
	for range 5 {
		var page struct {
			Sandboxes  []sandbox
			NextCursor string `json:"next_cursor"`
		}
		s.want(t, "GET", "/v1/sandboxes?limit=2"+cursor, nil, 200).decode(t, &page)
		for _, sb := range page.Sandboxes {
			got = append([]string{sb.ID}, got...)
		}
		if page.NextCursor == "" {
			break
		}
		cursor = "&cursor=" + page.NextCursor
	}
	if strings.Join(got, " ") != strings.Join(names, " ") {
		t.Errorf("pages gave %v; want %v", got, names)
	}
	for _, n := range []string{"a", "b", "c"} {
		s.want(t, "POST", "/v1/snapshots", m{"sandbox_id": names[0], "name": n}, 201)
	}
	var page struct {
		Snapshots  []struct{ Name string }
		NextCursor string `json:"next_cursor"`
	}
	s.want(t, "GET", "/v1/snapshots?limit=3", nil, 200).decode(t, &page)
	s.want(t, "GET", "/v1/snapshots?limit=3&cursor="+page.NextCursor, nil, 200).decode(t, &page)
	if len(page.Snapshots) != 1 || page.Snapshots[0].Name != "c" {
		t.Errorf("second page %+v", page)
	}
}
