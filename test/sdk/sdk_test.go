package sdk

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/test/harness"
)

func TestPythonSync(t *testing.T)  { script(t, modeA(t), sdk.Python(), "py/sync.py") }
func TestPythonAsync(t *testing.T) { script(t, modeA(t), sdk.Python(), "py/async_.py") }
func TestJavaScript(t *testing.T)  { script(t, modeA(t), sdk.Node(), "js/all.mjs") }

// The tests of templates build them with every step, and use what was built.
func TestPythonTemplates(t *testing.T)     { script(t, modeA(t), sdk.Python(), "py/templates.py") }
func TestJavaScriptTemplates(t *testing.T) { script(t, modeA(t), sdk.Node(), "js/templates.mjs") }

// TestAGibibyteStreamsInBoundedMemory: neither the server nor the guest agent
// holds more of a file than what is on its way.
func TestAGibibyteStreamsInBoundedMemory(t *testing.T) {
	before := resetPeak(t, server.PID())
	script(t, modeA(t), sdk.Python(), "py/stream.py")
	grown := peak(t, server.PID()) - before
	t.Logf("the server's peak grew by %d MiB from %d", grown>>20, before>>20)
	if grown > 128<<20 {
		t.Errorf("the server's memory grew by %d MiB", grown>>20)
	}
}

// resetPeak makes a process's peak of resident memory what it is now.
func resetPeak(t *testing.T, pid int) int64 {
	t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	return peak(t, pid)
}

func peak(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	var kib int64
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	return kib << 10
}

// TestCodeInterpreter builds the template of examples/code-interpreter and
// drives the clients of the code interpreter against it.
func TestCodeInterpreter(t *testing.T) {
	script(t, modeA(t), sdk.Python(), "py/interpreter.py")
	script(t, modeA(t), sdk.Node(), "js/interpreter.mjs")
}

// TestTraps holds what is easily got wrong: what becomes of streams, pauses
// without memory, waking on traffic, snapshots, forks, walls.
func TestTraps(t *testing.T) { script(t, modeA(t), sdk.Python(), "py/traps.py") }

// The tests of errors ask for what the SDKs have a class of error for, of a
// server with room for one sandbox and a low limit of requests.
func TestPythonErrors(t *testing.T) {
	script(t, modeAOf(t, smallServer(t)), sdk.Python(), "py/errors.py")
}
func TestJavaScriptErrors(t *testing.T) {
	script(t, modeAOf(t, smallServer(t)), sdk.Node(), "js/errors.mjs")
}

func smallServer(t *testing.T) *harness.Server {
	return ownServer(t, func(o *options) { o.Args = append(o.Args, "--memory-limit", "600", "--rate-limit", "50") })
}

type options = harness.Options

// ownServer is a server of the test's own.
func ownServer(t *testing.T, change func(*options)) *harness.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	o := options{Dir: filepath.Join(t.TempDir(), "s"), Output: t.Output(), Args: []string{"--on-exit", "destroy"}}
	change(&o)
	s, err := harness.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		s.Wipe()
	})
	return s
}

// The tests by domain find everything by names below it, over TLS with a
// certificate of the local authority and HTTP/2.
func TestPythonByDomain(t *testing.T)     { byDomain(t, sdk.Python(), "py/domain.py") }
func TestJavaScriptByDomain(t *testing.T) { byDomain(t, sdk.Node(), "js/domain.mjs") }

func byDomain(t *testing.T, args ...string) {
	ca := filepath.Join(server.Dir, "ca", "ca.pem")
	env := append(modeA(t)[2:], "E2B_DOMAIN="+published(), "NODE_EXTRA_CA_CERTS="+ca, "SSL_CERT_FILE="+ca)
	args = asIfByDNS(t, args...)
	script(t, env, args[0], args[1:]...)
}
