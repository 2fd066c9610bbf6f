package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// waitEvents is the log of a sandbox as far as it tells of waiting.
func waitEvents(t *testing.T, s *harness.Server, id string) string {
	t.Helper()
	list, err := s.ListEvents(t.Context(), id, 500, "")
	if err != nil {
		return err.Error()
	}
	var out []string
	for _, e := range list.Events {
		if e.Type == "wait" || e.Type == "go_on" {
			out = append(out, e.Type)
		}
	}
	return strings.Join(out, " ")
}

// TestAGuestOnAFullDiskWaitsForRoom: no write of a guest fails because the
// host's disk is full. It waits, through a refused pause and a kill of the
// server; that is told; and with room again everything goes on, checksums right.
func TestAGuestOnAFullDiskWaitsForRoom(t *testing.T) {
	s := ownServerIn(t, smallDisk(t, 1200))
	sb := create(t, s, client.CreateSandboxRequest{})
	sh(t, s, sb.ID, "head -c 48M /dev/urandom > /dev/shm/src")

	// Below the low-water mark nothing new is begun, and the guest goes on.
	empty := fill(t, s.Dir, 40<<20)
	_, err := s.CreateSandbox(timeout(t, time.Minute), client.CreateSandboxRequest{})
	if !client.IsHostUnavailable(err) || !strings.Contains(err.Error(), "disk") {
		t.Errorf("a create below the low-water mark: %v; want host_unavailable that names the disk", err)
	}
	sh(t, s, sb.ID, "head -c 1M /dev/urandom > small && sync small && rm small")
	empty()

	empty = fill(t, s.Dir, 8<<20)
	sh(t, s, sb.ID, `setsid bash -c 'cp /dev/shm/src big && sync big; echo "said $?" > /dev/shm/said' > /dev/null 2>&1 < /dev/null &`)
	eventually(t, time.Minute, "the log says that it waits", func() bool { return waitEvents(t, s, sb.ID) == "wait" })
	if _, text := raw(t, s, "GET", "/metrics", ""); !strings.Contains(text, "\nwrenn_sandboxes_waiting_for_disk 1\n") {
		t.Error("/metrics does not count it")
	}
	if out, _ := cli(t, s, "doctor", "--dir", s.Dir, "--json"); !strings.Contains(out, "writes wait for room in "+sb.ID) {
		t.Errorf("the doctor says %s", out)
	}
	if _, err := s.PauseSandbox(timeout(t, time.Minute), sb.ID); err == nil || !strings.Contains(err.Error(), "disk") {
		t.Errorf("a pause: %v; want an error that names the disk", err)
	}
	s.Kill()
	if err := s.Restart(timeout(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if now, err := s.GetSandbox(t.Context(), sb.ID); err != nil || now.Status != client.StatusRunning {
		t.Fatalf("%+v, %v; want running", now, err)
	}
	empty()
	eventually(t, time.Minute, "the write is done", func() bool {
		out, err := s.Sh(timeout(t, time.Minute), sb.ID, "cat /dev/shm/said")
		return err == nil && out == "said 0"
	})
	const compare = "sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches' && cmp /dev/shm/src big && ! sudo dmesg | grep -iE 'I/O error|EXT4-fs error|remount'"
	sh(t, s, sb.ID, compare)
	eventually(t, 30*time.Second, "the log says that it went on", func() bool { return strings.HasSuffix(waitEvents(t, s, sb.ID), "wait go_on") })
	pause(t, s, sb.ID)
	resume(t, s, sb.ID)
	sh(t, s, sb.ID, compare)
}

// TestDeletesWorkOnAFullDisk: when somebody else has filled the disk to the last
// block, and takes what is freed, what is paused or runs and snapshots can be
// deleted, which frees room; also by a server that starts on the full disk.
func TestDeletesWorkOnAFullDisk(t *testing.T) {
	s := ownServerIn(t, smallDisk(t, 1200))
	paused := create(t, s, client.CreateSandboxRequest{}).ID
	sh(t, s, paused, "head -c 8M /dev/urandom > big; sync")
	if _, err := s.CreateSnapshot(timeout(t, time.Minute), paused, "frozen"); err != nil {
		t.Fatal(err)
	}
	pause(t, s, paused)
	ran, clone := create(t, s, client.CreateSandboxRequest{Template: "frozen"}).ID, create(t, s, client.CreateSandboxRequest{Template: "frozen"}).ID

	ballast := filepath.Join(s.Dir, "ballast")
	takeAll(t, ballast)
	if _, err := s.PauseSandbox(timeout(t, time.Minute), ran); err == nil {
		t.Error("the disk is not full: a pause works")
	}
	freed := func(what string, del func() error) {
		t.Helper()
		takeAll(t, ballast)
		if err := del(); err != nil {
			t.Errorf("delete %s on a full disk: %v", what, err)
		}
	}
	freed("what runs", func() error { return s.DeleteSandbox(timeout(t, time.Minute), ran) })
	s.Kill()
	takeAll(t, ballast)
	if err := s.Restart(timeout(t, time.Minute)); err != nil {
		t.Fatalf("start on a full disk: %v", err)
	}
	if now, err := s.GetSandbox(t.Context(), clone); err != nil || now.Status != client.StatusRunning {
		t.Errorf("what runs is %+v, %v", now, err)
	}
	freed("what is paused", func() error { return s.DeleteSandbox(timeout(t, time.Minute), paused) })
	var st unix.Statfs_t
	if err := unix.Statfs(s.Dir, &st); err != nil || st.Bavail*uint64(st.Bsize) < 256<<10 {
		t.Errorf("then %d blocks of %d bytes are free, %v; want those of the pause", st.Bavail, st.Bsize, err)
	}
	freed("the snapshot", func() error { return s.DeleteSnapshot(timeout(t, time.Minute), "frozen") })
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if left := names(t, filepath.Join(s.Dir, "sandboxes")); !slices.Equal(left, []string{clone}) {
		t.Errorf("left: %v, want %s", left, clone)
	}
	sh(t, s, clone, "md5sum big > sum && sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches' && md5sum -c sum") // goes on
	sh(t, s, create(t, s, client.CreateSandboxRequest{}).ID, "true")
}

// takeAll has a file take every free block of its disk.
func takeAll(t *testing.T, ballast string) {
	t.Helper()
	f, err := os.OpenFile(ballast, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for chunk := make([]byte, 1<<20); ; {
		if _, err := f.Write(chunk); errors.Is(err, unix.ENOSPC) && len(chunk) == 4096 {
			return
		} else if errors.Is(err, unix.ENOSPC) {
			chunk = chunk[:4096]
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func eventually(t *testing.T, limit time.Duration, what string, f func() bool) {
	t.Helper()
	if !harness.Eventually(limit, f) {
		t.Fatalf("it does not come to pass that %s", what)
	}
}
