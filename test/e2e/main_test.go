package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// warm is the named snapshot that most tests create their sandboxes from: base,
// booted, with the keeper (see guest_test.go) running.
const warm = "warm"

// shared is the server that most tests use.
var shared struct {
	once sync.Once
	srv  *harness.Server
	log  bytes.Buffer
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if s := shared.srv; s != nil {
		if err := s.Stop(); err != nil && code == 0 {
			fmt.Fprintln(os.Stderr, "the shared server's end:", err)
			code = 1
		}
		s.Wipe()
		os.RemoveAll(s.Dir)
	}
	if code != 0 && shared.log.Len() > 0 {
		fmt.Fprintf(os.Stderr, "--- log of the shared server:\n%s", tail(shared.log.Bytes(), 16<<10))
	}
	os.Exit(code)
}

func tail(b []byte, n int) []byte {
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return b
}

// server returns the shared server, with the snapshot warm.
func server(t *testing.T) *harness.Server {
	t.Helper()
	requireHost(t)
	shared.once.Do(func() {
		dir, err := os.MkdirTemp(harness.DevDir(), "e-")
		if err != nil {
			shared.err = err
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
		defer cancel()
		shared.srv, shared.err = harness.Start(ctx, harness.Options{
			Dir: dir, Output: &shared.log, Args: []string{"--on-exit", "destroy"},
		})
		if shared.err == nil {
			shared.err = makeWarm(ctx, shared.srv)
		}
	})
	if shared.err != nil {
		t.Fatalf("the shared server: %v\n%s", shared.err, tail(shared.log.Bytes(), 4<<10))
	}
	return shared.srv
}

// ownServer starts a server of the test's own, which may be killed.
func ownServer(t *testing.T, args ...string) *harness.Server {
	t.Helper()
	requireHost(t)
	dir, err := os.MkdirTemp(harness.DevDir(), "e-")
	if err != nil {
		t.Fatal(err)
	}
	return ownServerIn(t, dir, args...)
}

func ownServerIn(t *testing.T, dir string, args ...string) *harness.Server {
	t.Helper()
	return loggedServerIn(t, dir, &syncBuffer{}, args...)
}

// loggedServerIn is ownServerIn for a test that reads the server's log.
func loggedServerIn(t *testing.T, dir string, log *syncBuffer, args ...string) *harness.Server {
	t.Helper()
	s, err := harness.Start(timeout(t, 15*time.Minute), harness.Options{Dir: dir, Output: log, Args: args})
	t.Cleanup(func() {
		endServer(t, s)
		if t.Failed() {
			t.Logf("the server's log:\n%s", tail(log.bytes(), 16<<10))
			if b, err := os.ReadFile(filepath.Join(dir, "run", "pager.log")); err == nil {
				t.Logf("the pager's log:\n%s", tail(b, 8<<10))
			}
		}
		os.RemoveAll(dir)
	})
	if err != nil {
		t.Fatalf("start the server: %v", err)
	}
	return s
}

// endServer destroys what runs and ends the server, whatever the test left.
func endServer(t *testing.T, s *harness.Server) {
	if s == nil || s.Client == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if s.Health(ctx) != nil {
		s.Kill()
		if err := s.Restart(ctx); err != nil {
			t.Logf("the server does not come up to clean up: %v", err)
			s.Wipe()
			return
		}
	}
	for sb, err := range s.Sandboxes(ctx, client.ListSandboxesOptions{}) {
		if err != nil {
			t.Logf("list what is left: %v", err)
			break
		}
		if err := s.DeleteSandbox(ctx, sb.ID); err != nil && !client.IsNotFound(err) {
			t.Errorf("delete %s (%s): %v", sb.ID, sb.Status, err)
		}
	}
	if err := s.Stop(); err != nil {
		t.Errorf("the server's end: %v", err)
	}
	for _, p := range harness.ProcessesOf(s.Dir) {
		t.Errorf("left after the server's end: %d %.200s", p.PID, readable(p))
	}
	s.Wipe()
}

// requireHost skips where sandboxes cannot run at all.
func requireHost(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the server makes network namespaces and serves page faults")
	}
	vmm := "qemu-system-x86_64"
	if harness.Driver() == "firecracker" {
		vmm = "firecracker"
	}
	if _, err := exec.LookPath(vmm); err != nil {
		t.Skip("needs QEMU (make setup) or the VMM of WRENN_TEST_DRIVER:", err)
	}
	if _, err := os.Stat(filepath.Join(harness.Bin(), "wrenn")); err != nil {
		t.Skip("needs the programs (make build):", err)
	}
	if err := os.MkdirAll(harness.DevDir(), 0o700); err != nil {
		t.Fatal(err)
	}
}

// timeout is a context of the test with a limit.
func timeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), d)
	t.Cleanup(cancel)
	return ctx
}

// create makes a sandbox that is deleted at the end of the test.
func create(t *testing.T, s *harness.Server, req client.CreateSandboxRequest) *client.Sandbox {
	t.Helper()
	sb, err := s.CreateSandbox(timeout(t, 3*time.Minute), req)
	if err != nil {
		t.Fatalf("create from %q: %v", req.Template, err)
	}
	t.Cleanup(func() { remove(t, s, sb.ID) })
	return sb
}

func remove(t *testing.T, s *harness.Server, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.DeleteSandbox(ctx, id); err != nil && !client.IsNotFound(err) && !client.IsUnreachable(err) {
		t.Errorf("delete %s: %v", id, err)
	}
}

// spawn makes a sandbox from the warm snapshot.
func spawn(t *testing.T, s *harness.Server) *client.Sandbox {
	t.Helper()
	return create(t, s, client.CreateSandboxRequest{Template: warm})
}

// sh runs a shell line and fails the test if it fails.
func sh(t *testing.T, s *harness.Server, id, line string) string {
	t.Helper()
	out, err := s.Sh(timeout(t, 3*time.Minute), id, line)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func pause(t *testing.T, s *harness.Server, id string) *client.Sandbox {
	t.Helper()
	sb, err := s.PauseSandbox(timeout(t, 2*time.Minute), id)
	if err != nil {
		t.Fatalf("pause %s: %v", id, err)
	}
	if sb.Status != client.StatusPaused {
		t.Fatalf("pause %s: status %s", id, sb.Status)
	}
	return sb
}

func resume(t *testing.T, s *harness.Server, id string) *client.Sandbox {
	t.Helper()
	sb, err := s.ResumeSandbox(timeout(t, 2*time.Minute), id)
	if err != nil {
		t.Fatalf("resume %s: %v", id, err)
	}
	if sb.Status != client.StatusRunning {
		t.Fatalf("resume %s: status %s", id, sb.Status)
	}
	return sb
}

// snapshot makes a named snapshot that is deleted at the end of the test.
func snapshot(t *testing.T, s *harness.Server, id, name string) *client.Snapshot {
	t.Helper()
	sn, err := s.CreateSnapshot(timeout(t, 2*time.Minute), id, name)
	if err != nil {
		t.Fatalf("snapshot %s as %s: %v", id, name, err)
	}
	t.Cleanup(func() {
		if err := s.DeleteSnapshot(context.Background(), name); err != nil && !client.IsNotFound(err) {
			t.Errorf("delete snapshot %s: %v", name, err)
		}
	})
	return sn
}

// raw sends a request as it is and returns status and body.
func raw(t *testing.T, s *harness.Server, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(timeout(t, time.Minute), method, s.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", apiKey(t, s))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: read the answer: %v", method, path, err)
	}
	return resp.StatusCode, string(b)
}

func apiKey(t *testing.T, s *harness.Server) string {
	t.Helper()
	key, err := os.ReadFile(filepath.Join(s.Dir, "api-key"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(key))
}

// cli runs the command line against a server.
func cli(t *testing.T, s *harness.Server, args ...string) (stdout string, code int) {
	t.Helper()
	cmd := exec.CommandContext(timeout(t, 3*time.Minute), filepath.Join(harness.Bin(), "wrenn"), args...)
	cmd.Env = append(os.Environ(), "WRENN_URL="+s.URL, "WRENN_DIR="+s.Dir, "WRENN_API_KEY="+apiKey(t, s))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, isExit := err.(*exec.ExitError); err != nil && !isExit {
		t.Fatalf("wrenn %v: %v", args, err)
	}
	if errs.Len() > 0 {
		t.Logf("wrenn %v: %s", args, errs.String())
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// syncBuffer takes a process's output while the test reads it.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.b.Bytes())
}

// jsonField reads one string field of a JSON object.
func jsonField(t *testing.T, text, name string) string {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatalf("not JSON: %v: %s", err, text)
	}
	v, _ := m[name].(string)
	return v
}
