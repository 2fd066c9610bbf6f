package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// smallDatabase opens a database on a disk of its own of so many bytes, and gives
// how to fill that to the last block.
func smallDatabase(t *testing.T, size int) (db *DB, dir string, fill func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a small disk; test/e2e has the same with a whole server")
	}
	dir = t.TempDir()
	if err := unix.Mount("wrenn-test", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	db, err := Open(t.Context(), filepath.Join(dir, "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db, dir, func() {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(dir, "ballast"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
}

// TestOnAFullDiskDeletesFindRoom: others write until they are refused, and the
// writes of deletes go on, also when what they use is taken by somebody else at
// once, and in the next process.
func TestOnAFullDiskDeletesFindRoom(t *testing.T) {
	ctx := t.Context()
	db, dir, fill := smallDatabase(t, 24<<20)
	const n = 4
	for i := range n {
		sb := control.Sandbox{ID: fmt.Sprint("s", i), Template: "base", Status: control.StatusRunning, CreatedAt: time.Now(), Metadata: map[string]string{}}
		if err := db.CreateSandbox(ctx, sb); err != nil {
			t.Fatal(err)
		}
	}
	fill()
	other := func(db *DB) {
		t.Helper()
		var err error
		for range 10000 { // the log is used again and again, until it must grow
			if err = db.AddEvent(ctx, control.Event{SandboxID: "s0", Type: "create", Detail: string(make([]byte, 8<<10))}); err != nil {
				break
			}
		}
		if control.CodeOf(err) != control.CodeHostUnavailable {
			t.Fatalf("an event that may not use the reserve: %v", err)
		}
	}
	remove := func(db *DB, i int) {
		t.Helper()
		ctx := control.WithReserve(ctx)
		id := fmt.Sprint("s", i)
		sb, err := db.GetSandbox(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		for _, st := range []control.Status{control.StatusStopping, control.StatusStopped} {
			sb.Status = st
			if err := db.UpdateSandbox(ctx, sb); err != nil {
				t.Errorf("%s becomes %s: %v", id, st, err)
			}
			sb.Version++
		}
		if err := db.AddEvent(ctx, control.Event{SandboxID: id, Type: control.EventDelete, Detail: string(make([]byte, 32<<10))}); err != nil {
			t.Errorf("the event of it: %v", err)
		}
	}
	for i := range n - 1 {
		other(db)
		fill()
		remove(db, i)
	}
	db.reserve.mu.Lock()
	left := db.reserve.size
	db.reserve.mu.Unlock()
	if left == reserveSize {
		t.Error("nothing of the reserve was used: the test does not test it")
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	fill()
	db, err := Open(ctx, filepath.Join(dir, "wrenn.db"))
	if err != nil {
		t.Fatalf("open on a full disk: %v", err)
	}
	defer db.Close()
	fill()
	remove(db, n-1)
	if got, err := db.GetSandbox(ctx, "s0"); err != nil || got.Status != control.StatusStopped {
		t.Errorf("s0 is %s, %v", got.Status, err)
	}
}

// TestTheReserveIsTakenAgainWithRoom, and not before there is plenty.
func TestTheReserveIsTakenAgainWithRoom(t *testing.T) {
	_, dir, fill := smallDatabase(t, 24<<20)
	path := filepath.Join(dir, "another-reserve")
	r, err := openReserve(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	held := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	if got := held(); got != reserveSize {
		t.Fatalf("it holds %d bytes, want %d", got, reserveSize)
	}
	fill()
	for want := int64(reserveSize - reservePart); want >= 0; want -= reservePart {
		if !r.spend() || held() != want {
			t.Fatalf("it holds %d bytes, want %d", held(), want)
		}
	}
	if r.spend() {
		t.Error("it gave what it has not")
	}
	fill()
	if r.fill() || held() != 0 {
		t.Errorf("without room it holds %d bytes", held())
	}
	if err := os.Remove(filepath.Join(dir, "ballast")); err != nil {
		t.Fatal(err)
	}
	if !r.fill() || held() != reserveSize {
		t.Errorf("with room it holds %d bytes", held())
	}
}
