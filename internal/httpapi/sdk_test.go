package httpapi_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/control/controltest"
	"git.omukk.dev/wrenn/sandbox/internal/httpapi"
)

// TestSDK drives the server with the Go SDK: both read the same document.
func TestSDK(t *testing.T) {
	t.Parallel()
	s := setup(t)
	ctx := t.Context()
	c, err := client.New(client.Options{BaseURL: s.URL, APIKey: s.key})
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(c.Health(ctx))
	sb, err := c.CreateSandbox(ctx, client.CreateSandboxRequest{Metadata: map[string]string{"a": "b"}, TimeoutSec: 100})
	must(err)
	res, err := c.Exec(ctx, sb.ID, client.ExecRequest{Cmd: "cat", Stdin: []byte{0xff, 0}})
	must(err)
	if !bytes.Equal(res.Stdout, []byte{0xff, 0}) {
		t.Errorf("stdout %q", res.Stdout)
	}
	must(c.PutFile(ctx, sb.ID, "/x", strings.NewReader("content"), client.PutOptions{Size: 7, Mode: 0o700}))
	f, err := c.GetFile(ctx, sb.ID, "/x", "")
	must(err)
	b, err := io.ReadAll(f)
	must(err)
	if string(b) != "content" || f.Size != 7 || f.Mode != 0o700 {
		t.Errorf("%q, size %d, mode %o", b, f.Size, f.Mode)
	}
	must(f.Close())
	entries, err := c.ListFiles(ctx, sb.ID, "/", client.ListFilesOptions{Depth: 3})
	must(err)
	if len(entries) != 1 || entries[0].Path != "/x" {
		t.Errorf("entries %+v", entries)
	}
	must(c.MakeDir(ctx, sb.ID, "/d", ""))
	must(c.DeleteFile(ctx, sb.ID, "/x", "root"))

	st, err := c.ExecStream(ctx, sb.ID, client.ExecRequest{Cmd: "cat", Stdin: []byte("in")})
	must(err)
	must(st.CloseStdin())
	var out bytes.Buffer
	code, err := st.Copy(&out, nil)
	if err != nil || code != 0 || out.String() != "in" {
		t.Errorf("%d %q %v", code, out.String(), err)
	}
	must(st.Close())
	pty, err := c.PTY(ctx, sb.ID, client.ExecRequest{}, client.PTYSize{Cols: 80, Rows: 24})
	must(err)
	_, err = pty.Write([]byte("ls\r"))
	must(err)
	must(pty.Resize(client.PTYSize{Cols: 90, Rows: 25}))
	must(pty.CloseStdin())
	out.Reset()
	if code, err := pty.Copy(&out, nil); err != nil || code != 0 || out.String() != "ls\r90x25" {
		t.Errorf("%d %q %v", code, out.String(), err)
	}
	must(pty.Close())

	_, err = c.CreateSnapshot(ctx, sb.ID, "warm")
	must(err)
	kids, err := c.ForkSandbox(ctx, sb.ID, 2)
	if err != nil || len(kids) != 2 {
		t.Errorf("%+v, %v", kids, err)
	}
	_, err = c.GetMetrics(ctx, sb.ID)
	must(err)
	_, err = c.PauseSandbox(ctx, sb.ID)
	must(err)
	if _, err := c.ExecStream(ctx, sb.ID, client.ExecRequest{Cmd: "cat"}); !client.IsInvalidState(err) {
		t.Errorf("a stream into a paused sandbox: %v", err)
	}
	_, err = c.ResumeSandbox(ctx, sb.ID)
	must(err)
	if got, err := c.SetTimeout(ctx, sb.ID, time.Hour); err != nil || got.TimeoutSec != 3600 {
		t.Errorf("%+v, %v", got, err)
	}
	n := 0
	for _, err := range c.Sandboxes(ctx, client.ListSandboxesOptions{Status: []string{"running"}, Metadata: map[string]string{"a": "b"}, Limit: 1}) {
		must(err)
		n++
	}
	if n != 3 {
		t.Errorf("%d sandboxes listed; want 3", n)
	}
	must(c.DeleteSnapshot(ctx, "warm"))
	must(c.DeleteSandbox(ctx, sb.ID))
	if _, err := c.GetSandbox(ctx, sb.ID); !client.IsNotFound(err) {
		t.Errorf("after delete: %v", err)
	}
}

// panicking is a host with a fault.
type panicking struct{ control.Host }

func TestPanicIsAnInternalError(t *testing.T) {
	t.Parallel()
	s := setup(t)
	id := s.create(t, m{}).ID
	var log bytes.Buffer
	h := httpapi.New(httpapi.Options{
		Service: control.New(control.Options{Store: s.store, Host: panicking{}}),
		Logger:  slog.New(slog.NewTextHandler(&log, nil)),
	})
	r := httptest.NewRequest("POST", "/v1/sandboxes/"+id+"/exec", strings.NewReader(`{"cmd":"x"}`))
	r.Header.Set("X-API-Key", s.key)
	r.Header.Set("X-Request-Id", "my-request")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 500 || !strings.Contains(w.Body.String(), "internal_error") || strings.Contains(w.Body.String(), "nil pointer") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if !strings.Contains(log.String(), "nil pointer") || !strings.Contains(log.String(), "my-request") || w.Header().Get("X-Request-Id") != "my-request" {
		t.Errorf("log %s", log.String())
	}
}

// TestUploadErrorOfHost: the host's refusal is told, not the client blamed.
func TestUploadErrorOfHost(t *testing.T) {
	t.Parallel()
	s := setup(t)
	id := s.create(t, m{}).ID
	s.host.Fail("write", errors.New("boom"))
	s.want(t, "PUT", "/v1/sandboxes/"+id+"/files?path=/x", []byte("x"), 500)
}

// TestAForkTellsOfEachChildThatIsMissing: those that could be made are given, with
// an error for each of the others, and the source goes on.
func TestAForkTellsOfEachChildThatIsMissing(t *testing.T) {
	t.Parallel()
	s := setup(t)
	c, err := client.New(client.Options{BaseURL: s.URL, APIKey: s.key})
	if err != nil {
		t.Fatal(err)
	}
	sb, err := c.CreateSandbox(t.Context(), client.CreateSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	s.host.FailLater("create", 2, controltest.Err(control.CodeHostUnavailable, "no room for it"))
	kids, err := c.ForkSandbox(t.Context(), sb.ID, 5)
	if len(kids) != 2 || !client.IsHostUnavailable(err) || strings.Count(err.Error(), "no room for it") != 3 {
		t.Errorf("%d children, %v; want 2, and why there are not 3 more", len(kids), err)
	}
	page, err := c.ListSandboxes(t.Context(), client.ListSandboxesOptions{})
	if err != nil || len(page.Sandboxes) != 3 {
		t.Errorf("%+v, %v; want the source and 2 children", page, err)
	}
	for _, sb := range page.Sandboxes {
		if sb.Status != client.StatusRunning {
			t.Errorf("%s is %s", sb.ID, sb.Status)
		}
	}
	if ids := s.host.IDs(); len(ids) != 3 {
		t.Errorf("the host has %v", ids)
	}
}
