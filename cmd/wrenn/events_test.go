package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
)

func TestSandboxEventsTellWhatHappened(t *testing.T) {
	host := startRealAPI(t)
	c, err := connect()
	if err != nil {
		t.Fatal(err)
	}
	waitHealthy(t, c)
	id := strings.TrimSpace(wrenn(t, "sandbox", "create", "-q").stdout)
	host.Fail("pause", controltest.Err(control.CodeHostUnavailable, "the disk is full"))
	wrenn(t, "sandbox", "pause", id).want(t, exitUnavailable, "the disk is full")
	host.Fail("pause", nil)
	if r := wrenn(t, "sandbox", "events", id); r.code != 0 || !strings.Contains(r.stdout, "create") ||
		!strings.Contains(r.stdout, "failed: the disk is full") {
		t.Errorf("%d %s%s", r.code, r.stdout, r.stderr)
	}
	// Following ends with the sandbox.
	followed := make(chan result)
	go func() { followed <- wrenn(t, "sandbox", "events", id, "--follow", "--json") }()
	wrenn(t, "sandbox", "pause", id).want(t, 0, "")
	wrenn(t, "sandbox", "rm", id).want(t, 0, "")
	r := <-followed
	var types []string
	for line := range strings.Lines(r.stdout) {
		var e client.SandboxEvent
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		types = append(types, e.Type)
	}
	if got := strings.Join(types, " "); r.code != 0 || got != "create pause pause delete" {
		t.Errorf("%d %s %s", r.code, got, r.stderr)
	}
	wrenn(t, "sandbox", "events", "nosuch").want(t, exitNotFound, "nosuch")
}

// A connection that breaks after the server took the request: the client sends
// it again, and there is one sandbox.
func TestACreateWhoseConnectionBreaksMakesOneSandbox(t *testing.T) {
	host := startRealAPI(t)
	direct, err := connect()
	if err != nil {
		t.Fatal(err)
	}
	waitHealthy(t, direct)
	target, err := url.Parse(os.Getenv("WRENN_URL"))
	if err != nil {
		t.Fatal(err)
	}
	var broken atomic.Int32
	proxy := httputil.NewSingleHostReverseProxy(target)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost && broken.Add(1) == 1 {
			proxy.ServeHTTP(httptest.NewRecorder(), r) // done, and never told
			panic(http.ErrAbortHandler)
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	t.Setenv("WRENN_URL", front.URL)
	wrenn(t, "sandbox", "create", "-q").want(t, 0, "")
	if n := len(host.IDs()); n != 1 || broken.Load() != 2 {
		t.Errorf("%d sandboxes after %d tries", n, broken.Load())
	}
}

func TestAnIdempotencyKeyOfTheCallersOwn(t *testing.T) {
	host := startRealAPI(t)
	c, err := connect()
	if err != nil {
		t.Fatal(err)
	}
	waitHealthy(t, c)
	ctx := client.WithIdempotencyKey(context.Background(), "build-17")
	a, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{})
	if err != nil || a.ID != b.ID || len(host.IDs()) != 1 {
		t.Errorf("%v, %v, %v: %d sandboxes", a, b, err, len(host.IDs()))
	}
	if _, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{VCPUs: 2}); !errors.Is(err, client.ErrConflict) {
		t.Errorf("another request under the same key: %v", err)
	}
}
