package client_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/client/clienttest"
)

// start gives a server and a client of it.
func start(t *testing.T) (*clienttest.Server, *client.Client) {
	t.Helper()
	s := clienttest.New()
	t.Cleanup(s.Close)
	c, err := client.New(client.Options{BaseURL: s.URL, APIKey: clienttest.Key})
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

func TestLifeCycle(t *testing.T) {
	_, c := start(t)
	ctx := t.Context()
	sb, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{Template: "base", MemoryMB: 256, VCPUs: 2,
		TimeoutSec: 60, AutoPause: true, Metadata: map[string]string{"owner": "ann"}})
	if err != nil {
		t.Fatal(err)
	}
	want := client.Sandbox{ID: "sb1", Template: "base", Status: client.StatusRunning, VCPUs: 2, MemoryMB: 256,
		Metadata: map[string]string{"owner": "ann"}, TimeoutSec: 60, AutoPause: true, CreatedAt: clienttest.Epoch,
		StartedAt: clienttest.Epoch.Add(time.Second), ExpiresAt: clienttest.Epoch.Add(61 * time.Second)}
	if d := cmp.Diff(want, *sb); d != "" {
		t.Fatalf("create (-want +got):\n%s", d)
	}
	if sb, err = c.PauseSandbox(ctx, sb.ID); err != nil || sb.Status != client.StatusPaused {
		t.Fatalf("pause: %+v, %v", sb, err)
	}
	if _, err := c.PauseSandbox(ctx, sb.ID); !client.IsInvalidState(err) {
		t.Fatalf("second pause: %v, want invalid_state", err)
	}
	if sb, err = c.ResumeSandbox(ctx, sb.ID); err != nil || sb.Status != client.StatusRunning {
		t.Fatalf("resume: %+v, %v", sb, err)
	}
	if sb, err = c.SetTimeout(ctx, sb.ID, 0); err != nil || sb.TimeoutSec != 0 || !sb.ExpiresAt.IsZero() {
		t.Fatalf("timeout 0: %+v, %v", sb, err)
	}
	forks, err := c.ForkSandbox(ctx, sb.ID, 3)
	if err != nil || len(forks) != 3 {
		t.Fatalf("fork: %v, %v", forks, err)
	}
	forks, err = c.ForkSandbox(ctx, sb.ID, clienttest.MaxForks+1)
	if len(forks) != clienttest.MaxForks || !client.IsHostUnavailable(err) || !strings.Contains(err.Error(), "fork 5 of 5") {
		t.Fatalf("fork of too many: %d, %v; want 4 and an error", len(forks), err)
	}
	m, err := c.GetMetrics(ctx, sb.ID)
	if err != nil || m.CPUUsedPct != 12.5 || m.MemTotal != 512<<20 {
		t.Fatalf("metrics: %+v, %v", m, err)
	}
	if err := c.DeleteSandbox(ctx, sb.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.GetSandbox(ctx, sb.ID); !client.IsNotFound(err) || !errors.Is(err, client.ErrNotFound) {
		t.Fatalf("get of a deleted one: %v, want not_found", err)
	}
}

func TestListsWalkAllPages(t *testing.T) {
	s, c := start(t)
	s.PageSize = 2
	for i := range 5 {
		sb := client.Sandbox{Status: client.StatusRunning, Metadata: map[string]string{"k": "a b&c"}}
		if i == 3 {
			sb = client.Sandbox{Status: client.StatusError}
		}
		s.Add(sb)
	}
	ids := func(o client.ListSandboxesOptions) (ids []string) {
		for sb, err := range c.Sandboxes(t.Context(), o) {
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, sb.ID)
		}
		return ids
	}
	for _, tc := range []struct {
		name string
		o    client.ListSandboxesOptions
		want []string
	}{
		{"all", client.ListSandboxesOptions{}, []string{"sb1", "sb2", "sb3", "sb4", "sb5"}},
		{"limit is of a page", client.ListSandboxesOptions{Limit: 1}, []string{"sb1", "sb2", "sb3", "sb4", "sb5"}},
		{"from a cursor", client.ListSandboxesOptions{Cursor: "3"}, []string{"sb4", "sb5"}},
		{"status", client.ListSandboxesOptions{Status: []string{"error", "paused"}}, []string{"sb4"}},
		{"metadata", client.ListSandboxesOptions{Metadata: map[string]string{"k": "a b&c"}}, []string{"sb1", "sb2", "sb3", "sb5"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := ids(tc.o); !slices.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
	for range c.Sandboxes(t.Context(), client.ListSandboxesOptions{}) {
		break // leaving the walk early must not panic
	}
}

func TestListWithARepeatedCursorEnds(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"sandboxes":[{"id":"a"}],"next_cursor":"same"}`)
	}))
	defer srv.Close()
	c, _ := client.New(client.Options{BaseURL: srv.URL})
	n := 0
	var last error
	for _, err := range c.Sandboxes(t.Context(), client.ListSandboxesOptions{}) {
		n++
		last = err
	}
	if n != 3 || last == nil {
		t.Errorf("got %d items, last error %v; want two and an error", n, last)
	}
}

func TestSnapshots(t *testing.T) {
	s, c := start(t)
	s.PageSize = 1
	sb := s.Add(client.Sandbox{})
	snap, err := c.CreateSnapshot(t.Context(), sb.ID, "warm.python-1")
	if err != nil || snap.Parent != "base" || snap.MemoryMB != 512 {
		t.Fatalf("create: %+v, %v", snap, err)
	}
	if _, err := c.CreateSnapshot(t.Context(), sb.ID, "warm.python-1"); !client.IsConflict(err) {
		t.Fatalf("second create: %v, want conflict", err)
	}
	var names []string
	for s, err := range c.Snapshots(t.Context(), client.ListSnapshotsOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, s.Type+" "+s.Name)
	}
	if want := []string{"base base", "snapshot warm.python-1"}; !slices.Equal(names, want) {
		t.Errorf("list: %v, want %v", names, want)
	}
	page, err := c.ListSnapshots(t.Context(), client.ListSnapshotsOptions{Type: client.SnapshotTypeSnapshot})
	if err != nil || len(page.Snapshots) != 1 || page.NextCursor != "" {
		t.Errorf("list of one type: %+v, %v", page, err)
	}
	if got, err := c.GetSnapshot(t.Context(), "warm.python-1"); err != nil || *got != *snap {
		t.Errorf("get: %+v, %v", got, err)
	}
	if err := c.DeleteSnapshot(t.Context(), "warm.python-1"); err != nil {
		t.Error(err)
	}
	if err := c.DeleteSnapshot(t.Context(), "warm.python-1"); !client.IsNotFound(err) {
		t.Errorf("second delete: %v, want not_found", err)
	}
}

// What cannot be right is refused without a request; above all no empty ID may
// turn a call about one sandbox into one about the collection.
func TestBadValuesAreNotSent(t *testing.T) {
	s, c := start(t)
	ctx := t.Context()
	bad := []string{"", ".", "..", "A", "a/b", "a?b", "ä", "a b", strings.Repeat("a", 65)}
	calls := map[string]func(v string) error{
		"get":     func(v string) error { _, err := c.GetSandbox(ctx, v); return err },
		"delete":  func(v string) error { return c.DeleteSandbox(ctx, v) },
		"pause":   func(v string) error { _, err := c.PauseSandbox(ctx, v); return err },
		"resume":  func(v string) error { _, err := c.ResumeSandbox(ctx, v); return err },
		"timeout": func(v string) error { _, err := c.SetTimeout(ctx, v, time.Second); return err },
		"fork":    func(v string) error { _, err := c.ForkSandbox(ctx, v, 1); return err },
		"exec":    func(v string) error { _, err := c.Exec(ctx, v, client.ExecRequest{Cmd: "x"}); return err },
		"stream":  func(v string) error { _, err := c.ExecStream(ctx, v, client.ExecRequest{Cmd: "x"}); return err },
		"pty": func(v string) error {
			_, err := c.PTY(ctx, v, client.ExecRequest{}, client.PTYSize{Cols: 1, Rows: 1})
			return err
		},
		"metrics":  func(v string) error { _, err := c.GetMetrics(ctx, v); return err },
		"file":     func(v string) error { return c.DeleteFile(ctx, v, "/x", "") },
		"snapshot": func(v string) error { _, err := c.CreateSnapshot(ctx, v, "x"); return err },
	}
	for name, call := range calls {
		for _, v := range bad {
			if err := call(v); !client.IsInvalidRequest(err) {
				t.Errorf("%s %q: %v, want invalid_request", name, v, err)
			}
		}
	}
	names := []string{"", "..", "-a", "A", "a/b", strings.Repeat("a", 64)}
	for _, n := range names {
		if err := c.DeleteSnapshot(ctx, n); !client.IsInvalidRequest(err) {
			t.Errorf("delete snapshot %q: %v", n, err)
		}
	}
	for _, n := range []string{"A", "a:", "a:b:c", "a:../b", ":b"} {
		if _, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{Template: n}); !client.IsInvalidRequest(err) {
			t.Errorf("create from %q: %v", n, err)
		}
	}
	for name, err := range map[string]error{
		"fork 0":           second(c.ForkSandbox(ctx, "a", 0)),
		"negative timeout": second(c.SetTimeout(ctx, "a", -time.Second)),
		"half a second":    second(c.SetTimeout(ctx, "a", time.Second/2)),
		"no command":       second(c.Exec(ctx, "a", client.ExecRequest{})),
		"exec limit":       second(c.Exec(ctx, "a", client.ExecRequest{Cmd: "x", TimeoutSec: -1})),
		"no path":          second(c.GetFile(ctx, "a", "", "")),
		"NUL in path":      c.MakeDir(ctx, "a", "/a\x00b", ""),
		"mode":             c.PutFile(ctx, "a", "/a", strings.NewReader(""), client.PutOptions{Mode: 0o10000}),
		"size":             c.PutFile(ctx, "a", "/a", strings.NewReader(""), client.PutOptions{Size: -1}),
		"depth":            second(c.ListFiles(ctx, "a", "/", client.ListFilesOptions{Depth: -1})),
		"limit":            second(c.ListSandboxes(ctx, client.ListSandboxesOptions{Limit: -1})),
		"terminal":         second(c.PTY(ctx, "a", client.ExecRequest{}, client.PTYSize{})),
	} {
		if !client.IsInvalidRequest(err) {
			t.Errorf("%s: %v, want invalid_request", name, err)
		}
	}
	if log := s.Log(); len(log) != 0 {
		t.Errorf("requests were sent: %v", log)
	}
}

func second[T any](_ T, err error) error { return err }

func TestNewRefusesBadOptions(t *testing.T) {
	for _, o := range []client.Options{
		{BaseURL: "127.0.0.1:8000"}, {BaseURL: "ftp://x"}, {BaseURL: "http://"}, {BaseURL: "http://x/?a=b"},
		{BaseURL: "http://x/#f"}, {BaseURL: "http://[::1"}, {APIKey: "a\nb"},
	} {
		if _, err := client.New(o); err == nil {
			t.Errorf("%+v was taken", o)
		} else if o.APIKey != "" && strings.Contains(err.Error(), "a\nb") {
			t.Errorf("the error tells the key: %v", err)
		}
	}
	c, err := client.New(client.Options{})
	if err != nil || c.BaseURL() != client.DefaultBaseURL {
		t.Errorf("defaults: %v, %v", c, err)
	}
}

func TestErrorsOfTheServer(t *testing.T) {
	var status int
	var body string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}))
	defer srv.Close()
	c, _ := client.New(client.Options{BaseURL: srv.URL})
	api := func(code string) string { return `{"error":{"code":"` + code + `","message":"why"}}` }
	for _, tc := range []struct {
		status int
		body   string
		is     func(error) bool
		text   string
	}{
		{400, api("invalid_request"), client.IsInvalidRequest, "why"},
		{401, api("unauthorized"), client.IsUnauthorized, "why"},
		{404, api("not_found"), client.IsNotFound, "why"},
		{409, api("conflict"), client.IsConflict, "why"},
		{409, api("invalid_state"), client.IsInvalidState, "why"},
		{413, api("too_large"), client.IsTooLarge, "why"},
		{503, api("host_unavailable"), client.IsHostUnavailable, "why"},
		{500, api("internal_error"), func(err error) bool { return errors.Is(err, client.ErrInternal) }, "why"},
		{502, "<html>bad gateway</html>", client.IsHostUnavailable, "HTTP 502"},
		{403, "", client.IsUnauthorized, "HTTP 403"},
		{404, "\xff\xfe not ours", client.IsNotFound, "HTTP 404"},
		{418, strings.Repeat("ä", 70_000), client.IsInvalidRequest, "HTTP 418"},
		{500, `{"error":"odd"}`, func(err error) bool { return errors.Is(err, client.ErrInternal) }, "odd"},
	} {
		status, body = tc.status, tc.body
		_, err := c.GetSandbox(t.Context(), "a")
		var e *client.Error
		if !errors.As(err, &e) || e.Status != tc.status || !tc.is(err) || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%d %.40q gave %v", tc.status, tc.body, err)
		}
		if len(err.Error()) > 300 {
			t.Errorf("%d: message of %d bytes", tc.status, len(err.Error()))
		}
	}
	if client.IsConflict(client.ErrInvalidState) || client.IsUnreachable(client.ErrHostUnavailable) {
		t.Error("codes are mixed up")
	}
}

func TestOddAnswers(t *testing.T) {
	var body string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) }))
	defer srv.Close()
	c, _ := client.New(client.Options{BaseURL: srv.URL})
	for _, body = range []string{"", "{", "[]", `{"id":1}`, "<html>"} {
		if _, err := c.GetSandbox(t.Context(), "a"); err == nil {
			t.Errorf("%q was taken for a sandbox", body)
		}
	}
	for _, body = range []string{`{}`, `{"exit_code":0,"encoding":"rot13"}`, `{"exit_code":0,"encoding":"base64","stdout":"*"}`} {
		if r, err := c.Exec(t.Context(), "a", client.ExecRequest{Cmd: "x"}); err == nil {
			t.Errorf("%q was taken for a result: %+v", body, r)
		}
	}
}

// flaky breaks the first n connections before they answer.
func flaky(t *testing.T, n int64) (url string, tries *atomic.Int64) {
	t.Helper()
	tries = new(atomic.Int64)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if tries.Add(1) <= n {
			panic(http.ErrAbortHandler)
		}
		_, _ = io.WriteString(w, `{"id":"a"}`)
	}))
	t.Cleanup(srv.Close)
	return srv.URL, tries
}

func TestOnlyWhatIsSafeIsTriedAgain(t *testing.T) {
	url, tries := flaky(t, 2)
	c, _ := client.New(client.Options{BaseURL: url})
	if _, err := c.GetSandbox(t.Context(), "a"); err != nil || tries.Load() != 3 {
		t.Errorf("get: %v after %d tries, want success after 3", err, tries.Load())
	}
	url, tries = flaky(t, 1)
	c, _ = client.New(client.Options{BaseURL: url})
	if _, err := c.PauseSandbox(t.Context(), "a"); err == nil || tries.Load() != 1 {
		t.Errorf("pause: %v after %d tries, want an error after 1", err, tries.Load())
	}
	url, tries = flaky(t, 100)
	c, _ = client.New(client.Options{BaseURL: url})
	if _, err := c.GetSandbox(t.Context(), "a"); err == nil || tries.Load() != 3 {
		t.Errorf("get: %v after %d tries, want an error after 3", err, tries.Load())
	}
}

func TestAnswersAreNotTriedAgain(t *testing.T) {
	s, c := start(t)
	s.Fail = func(*http.Request) *client.Error {
		return &client.Error{Status: 503, Code: client.CodeHostUnavailable, Message: "starting"}
	}
	if err := c.Health(t.Context()); !client.IsHostUnavailable(err) || len(s.Log()) != 1 {
		t.Errorf("health: %v, requests %v", err, s.Log())
	}
}

func TestUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + l.Addr().String()
	l.Close()
	c, _ := client.New(client.Options{BaseURL: url})
	if err := c.Health(t.Context()); !client.IsUnreachable(err) {
		t.Errorf("health: %v, want unreachable", err)
	}
	if _, err := c.ExecStream(t.Context(), "a", client.ExecRequest{Cmd: "x"}); !client.IsUnreachable(err) {
		t.Errorf("stream: %v, want unreachable", err)
	}
}

func TestCancelledContextEndsACall(t *testing.T) {
	block := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-block:
		case <-r.Context().Done():
		}
	}))
	defer srv.Close()
	defer close(block)
	c, _ := client.New(client.Options{BaseURL: srv.URL})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.GetSandbox(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
}
