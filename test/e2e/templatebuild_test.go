package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// startBuild requests a build of a name and starts it with one RUN.
func startBuild(t *testing.T, s *harness.Server, name, line string) (id string) {
	t.Helper()
	status, text := raw(t, s, http.MethodPost, "/e2b/v3/templates", fmt.Sprintf(`{"name":%q}`, name))
	if status != http.StatusAccepted {
		t.Fatalf("request a build: %d %s", status, text)
	}
	id = jsonField(t, text, "buildID")
	status, text = raw(t, s, http.MethodPost, "/e2b/v2/templates/"+name+"/builds/"+id,
		fmt.Sprintf(`{"fromTemplate":"base","steps":[{"type":"RUN","args":[%q]}]}`, line))
	if status != http.StatusAccepted {
		t.Fatalf("start a build: %d %s", status, text)
	}
	return id
}

func buildStatus(t *testing.T, s *harness.Server, name, id string) (status, all string) {
	t.Helper()
	code, text := raw(t, s, http.MethodGet, "/e2b/templates/"+name+"/builds/"+id+"/status", "")
	if code != http.StatusOK {
		t.Fatalf("status of a build: %d %s", code, text)
	}
	return jsonField(t, text, "status"), text
}

// noneLeft waits until there is no sandbox: one that is being removed is seen
// for a moment.
func noneLeft(t *testing.T, s *harness.Server) {
	t.Helper()
	if !harness.Eventually(time.Minute, func() bool {
		page, err := s.ListSandboxes(timeout(t, time.Minute), client.ListSandboxesOptions{})
		return err == nil && len(page.Sandboxes) == 0
	}) {
		t.Error("a sandbox of the build is left")
	}
}

// A build that a crash of the server cuts off has failed, says so, and leaves
// nothing; one that is cancelled too.
func TestABuildThatIsCutOffLeavesNothing(t *testing.T) {
	s := ownServer(t)
	id := startBuild(t, s, "cut", "echo it runs; sleep 1000")
	if !harness.Eventually(2*time.Minute, func() bool {
		_, text := buildStatus(t, s, "cut", id)
		return strings.Contains(text, `"message":"it runs"`)
	}) {
		_, text := buildStatus(t, s, "cut", id)
		t.Fatalf("the step does not run: %s", text)
	}
	s.Kill()
	if err := s.Restart(timeout(t, 2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	if status, text := buildStatus(t, s, "cut", id); status != "error" || !strings.Contains(text, "restarted") {
		t.Errorf("after the crash: %s", text)
	}
	noneLeft(t, s)

	id = startBuild(t, s, "cut", "echo it runs; sleep 1000")
	if !harness.Eventually(2*time.Minute, func() bool {
		_, text := buildStatus(t, s, "cut", id)
		return strings.Contains(text, `"message":"it runs"`)
	}) {
		t.Fatal("the step of the second build does not run")
	}
	if code, text := raw(t, s, http.MethodDelete, "/e2b/templates/cut/builds/"+id, ""); code != http.StatusNoContent {
		t.Errorf("cancel: %d %s", code, text)
	}
	if status, text := buildStatus(t, s, "cut", id); status != "error" || !strings.Contains(text, "cancelled") {
		t.Errorf("after the cancel: %s", text)
	}
	noneLeft(t, s)
	for sn, err := range s.Snapshots(timeout(t, time.Minute), client.ListSnapshotsOptions{Type: client.SnapshotTypeSnapshot}) {
		t.Errorf("a snapshot is left: %+v, %v", sn, err)
	}
}
