package e2e

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// readiness asks /readyz and returns which checks fail.
func readiness(t *testing.T, s *harness.Server) (status int, failed []string) {
	t.Helper()
	status, body := raw(t, s, "GET", "/readyz", "")
	var h struct {
		Status string
		Checks []struct{ Name, Status, Message string }
	}
	if err := json.Unmarshal([]byte(body), &h); err != nil || len(h.Checks) < 5 {
		t.Fatalf("/readyz says %s: %v", body, err)
	}
	for _, c := range h.Checks {
		if c.Status != "ok" {
			failed = append(failed, c.Name)
			if c.Message == "" {
				t.Errorf("%s does not say what is wrong", c.Name)
			}
		}
	}
	return status, failed
}

// TestReadinessFollowsDiskAndPager: what is wrong is named while it is wrong,
// and running sandboxes are not touched by it.
func TestReadinessFollowsDiskAndPager(t *testing.T) {
	s := ownServerIn(t, smallDisk(t, 1200))
	sb := create(t, s, client.CreateSandboxRequest{})
	is := func(status int, failed string) {
		t.Helper()
		var have int
		var names []string
		if !harness.Eventually(time.Minute, func() bool {
			have, names = readiness(t, s)
			return have == status && strings.Join(names, " ") == failed
		}) {
			t.Errorf("/readyz says %d, %v; want %d, %q", have, names, status, failed)
		}
		if code, body := raw(t, s, "GET", "/healthz", ""); code != 200 {
			t.Errorf("/healthz says %d: %s", code, body)
		}
	}
	is(200, "")
	empty := fill(t, s.Dir, 20<<20) // below 5 % of the disk
	is(503, "disk")
	sh(t, s, sb.ID, "true")
	empty()
	is(200, "")
	pager := s.Pager()
	if err := syscall.Kill(pager.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	is(503, "pager")
	if err := syscall.Kill(pager.PID, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	is(200, "")
	sh(t, s, sb.ID, "true")
}

// TestMetricsTellWhatTheHostDid looks for the figures of one life cycle.
func TestMetricsTellWhatTheHostDid(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	ask(t, s, sb.ID, "stat") // reads all its memory
	pause(t, s, sb.ID)
	resume(t, s, sb.ID)
	_, text := raw(t, s, "GET", "/metrics", "")
	for _, want := range []string{
		`wrenn_sandboxes{status="running"}`,
		`wrenn_operation_duration_seconds_bucket{code="ok",operation="pause",le="`,
		`wrenn_host_phase_duration_seconds_count{operation="ResumeSandbox",phase="`,
		`wrenn_host_written_bytes_total{operation="PauseSandbox",part="memory"}`,
		`wrenn_network_slots{state="ready"}`, "wrenn_disk_free_bytes", "go_goroutines", "process_open_fds",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("/metrics has no %s", want)
		}
	}
	for _, name := range []string{"wrenn_pager_faults_total", "wrenn_pager_filled_bytes_total", "wrenn_pager_shared_resident_bytes"} {
		if !strings.Contains(text, "\n"+name+" ") || strings.Contains(text, "\n"+name+" 0\n") {
			t.Errorf("/metrics has no figure of %s", name)
		}
	}
}
