package store

import (
	"path/filepath"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// TestAFullDatabaseSaysSo: a refusal that names the disk, and nothing half
// written.
func TestAFullDatabaseSaysSo(t *testing.T) {
	ctx := t.Context()
	db, err := Open(ctx, filepath.Join(t.TempDir(), "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.db.SetMaxOpenConns(1)                                                       // the limit is one connection's
	if _, err := db.db.ExecContext(ctx, "PRAGMA max_page_count = 1"); err != nil { // no more than there are
		t.Fatal(err)
	}
	long := string(make([]byte, 64<<10))
	sb := control.Sandbox{ID: "a1", Template: "base", Status: control.StatusRunning, Error: long, CreatedAt: time.Now(), Metadata: map[string]string{}}
	full := func(what string, err error) {
		t.Helper()
		if control.CodeOf(err) != control.CodeHostUnavailable {
			t.Errorf("%s: %v, want host_unavailable", what, err)
		}
	}
	full("create", db.CreateSandbox(ctx, sb))
	if _, err := db.GetSandbox(ctx, "a1"); err != control.ErrNotFound {
		t.Errorf("of a create that was refused there is %v", err)
	}
	sb.Error = ""
	if err := db.CreateSandbox(ctx, sb); err != nil { // there is room in the pages that are there
		t.Fatal(err)
	}
	sb.Version, sb.Error = 1, long
	full("update", db.UpdateSandbox(ctx, sb))
	if got, err := db.GetSandbox(ctx, "a1"); err != nil || got.Error != "" || got.Version != 1 {
		t.Errorf("after an update that was refused: version %d, %v", got.Version, err)
	}
	full("event", db.AddEvent(ctx, control.Event{SandboxID: "a1", Type: "create", Detail: long}))
	if err := db.DeleteSandbox(ctx, "a1", 1); err != nil {
		t.Errorf("a delete needs no room: %v", err)
	}
}
