package main

import (
	"context"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
	"git.omukk.dev/wrenn/sandbox/internal/httpapi"
	"git.omukk.dev/wrenn/sandbox/internal/store"
)

// startRealAPI serves the real API and control plane over a host without
// machines, and points the environment at it by way of the key file.
func startRealAPI(t *testing.T) *controltest.Host {
	t.Helper()
	dir := t.TempDir()
	db, err := store.Open(t.Context(), filepath.Join(dir, "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := control.EnsureAPIKey(t.Context(), db, filepath.Join(dir, "api-key")); err != nil {
		t.Fatal(err)
	}
	host := controltest.NewHost()
	svc := control.New(control.Options{Store: db, Host: host})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- svc.Run(ctx) }()
	srv := httptest.NewServer(httpapi.New(httpapi.Options{Service: svc}))
	t.Cleanup(func() { srv.Close(); cancel(); <-ended })
	t.Setenv("WRENN_URL", srv.URL)
	t.Setenv("WRENN_API_KEY", "")
	t.Setenv("WRENN_DIR", dir)
	return host
}

// The imitation that the other tests use could agree with the client and not
// with the server; this is the server.
func TestAgainstTheRealAPI(t *testing.T) {
	startRealAPI(t)
	c, err := connect()
	if err != nil {
		t.Fatal(err)
	}
	waitHealthy(t, c)
	ok := func(args ...string) string {
		t.Helper()
		r := wrenn(t, args...)
		if r.code != 0 {
			t.Fatalf("%v: %d %s", args, r.code, r.stderr)
		}
		return r.stdout
	}
	id := strings.TrimSpace(ok("sandbox", "create", "-q", "-m", "owner=ann", "-e", "A=b", "--timeout", "1h", "--auto-pause"))
	for range 2 {
		ok("sandbox", "create")
	}
	if got := ok("sandbox", "list", "-q", "-m", "owner=ann", "--status", "running,paused"); got != id+"\n" {
		t.Errorf("list: %q, want %q", got, id)
	}
	n := 0
	for _, err := range c.Sandboxes(t.Context(), client.ListSandboxesOptions{Limit: 1}) {
		if n++; err != nil {
			t.Fatal(err)
		}
	}
	if n != 3 {
		t.Errorf("the walk over pages found %d sandboxes", n)
	}
	ok("sandbox", "timeout", id, "0")
	ok("sandbox", "pause", id)
	wrenn(t, "sandbox", "pause", id).want(t, 4, "invalid_state")
	wrenn(t, "sandbox", "exec", id, "echo").want(t, 125, "invalid_state")
	wrenn(t, "sandbox", "exec", "nobody", "echo").want(t, 125, "not_found")
	ok("sandbox", "resume", id)

	if got := ok("sandbox", "exec", id, "echo", "a", "ü"); got != "a ü\n" {
		t.Errorf("exec echo: %q", got)
	}
	if got := ok("sandbox", "exec", id, "bytes"); got != "\xff\x00\xfe" {
		t.Errorf("exec bytes: %q", got)
	}
	wrenn(t, "sandbox", "exec", id, "exit", "77").want(t, 77, "")
	wrenn(t, "sandbox", "exec", id, "fail", "oops").want(t, 1, "oops")
	wrenn(t, "sandbox", "exec", "-u", "No Such", id, "echo").want(t, 125, "invalid_request: user")
	in := strings.Repeat("€\xff", 20_000)
	if r := wrennIn(t, strings.NewReader(in), "sandbox", "exec", id, "cat"); r.code != 0 || r.stdout != in {
		t.Errorf("exec cat: %d, %d bytes, %s", r.code, len(r.stdout), r.stderr)
	}
	if got := ok("sandbox", "exec", "--json", id, "bytes"); !strings.Contains(got, `"encoding": "base64"`) {
		t.Errorf("exec --json: %s", got)
	}
	testRealPTY(t, c, id)

	if r := wrennIn(t, strings.NewReader(in), "sandbox", "cp", "-", id+":/dir/a b"); r.code != 0 {
		t.Fatalf("cp in: %s", r.stderr)
	}
	if r := wrenn(t, "sandbox", "cp", id+":/dir/a b", "-"); r.stdout != in {
		t.Errorf("cp out: %d, %d bytes, %s", r.code, len(r.stdout), r.stderr)
	}
	f, err := c.GetFile(t.Context(), id, "/dir/a b", "user")
	if err != nil || f.Mode != 0o644 || f.Size != int64(len(in)) || f.Close() != nil {
		t.Errorf("get: %+v, %v", f, err)
	}
	entries, err := c.ListFiles(t.Context(), id, "/dir", client.ListFilesOptions{Depth: 2, User: "root"})
	if err != nil || len(entries) != 1 || entries[0].Path != "/dir/a b" {
		t.Errorf("list: %+v, %v", entries, err)
	}
	if err := c.MakeDir(t.Context(), id, "/new", "user"); err != nil {
		t.Error(err)
	}
	if err := c.DeleteFile(t.Context(), id, "/dir/a b", "user"); err != nil {
		t.Error(err)
	}
	wrenn(t, "sandbox", "cp", id+":/dir/a b", "-").want(t, 3, "not_found")
	if _, err := c.GetMetrics(t.Context(), id); err != nil {
		t.Error(err)
	}

	ok("snapshot", "create", id, "warm")
	wrenn(t, "snapshot", "create", id, "warm").want(t, 4, "conflict")
	wrenn(t, "sandbox", "create", "warm", "--memory", "4096").want(t, 2, "memory_mb")
	ok("sandbox", "create", "warm")
	if got := ok("snapshot", "list", "-q"); got != "warm\n" {
		t.Errorf("snapshot list: %q", got)
	}
	if got := ok("template", "list", "-q"); got != "base\nwarm\n" {
		t.Errorf("template list: %q", got)
	}
	ok("snapshot", "get", "warm")
	ok("snapshot", "rm", "warm")
	if got := strings.Fields(ok("sandbox", "fork", id, "-n", "2", "-q")); len(got) != 2 {
		t.Errorf("fork: %q", got)
	}
	ok("sandbox", "rm", id)
	wrenn(t, "sandbox", "get", id).want(t, 3, "not_found")
	t.Setenv("WRENN_API_KEY", "wrn_wrong")
	wrenn(t, "sandbox", "list").want(t, 5, "unauthorized")
}

// waitHealthy asks again and again, as a load balancer would: there is no event
// for a server's having started.
func waitHealthy(t *testing.T, c *client.Client) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(patience); ; <-tick.C {
		err := c.Health(t.Context())
		if err == nil {
			return
		}
		if !client.IsHostUnavailable(err) || time.Now().After(limit) {
			t.Fatal(err)
		}
	}
}

func testRealPTY(t *testing.T, c *client.Client, id string) {
	t.Helper()
	st, err := c.PTY(t.Context(), id, client.ExecRequest{}, client.PTYSize{Cols: 80, Rows: 24})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := st.Resize(client.PTYSize{Cols: 132, Rows: 43}); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write([]byte("typed")); err != nil {
		t.Fatal(err)
	}
	if err := st.Stop(); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	code, err := st.Copy(&out, nil)
	if code != 143 || err != nil || out.String() != "132x43typed" {
		t.Errorf("pty: %d, %v, %q", code, err, out.String())
	}
}
