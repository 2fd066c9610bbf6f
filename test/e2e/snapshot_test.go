package e2e

import (
	"strings"
	"sync"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// spawnAll makes n sandboxes of a snapshot at the same time.
func spawnAll(t *testing.T, s *harness.Server, template string, n int) []string {
	t.Helper()
	ids := make([]string, n)
	errs := make([]error, n)
	ctx := timeout(t, 3*time.Minute)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			sb, err := s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: template})
			if err == nil {
				ids[i] = sb.ID
			}
			errs[i] = err
		})
	}
	wg.Wait()
	for i, id := range ids {
		if id != "" {
			t.Cleanup(func() { remove(t, s, id) })
		}
		if errs[i] != nil {
			t.Errorf("spawn %d of %d from %s: %v", i+1, n, template, errs[i])
		}
	}
	if t.Failed() {
		t.FailNow()
	}
	return ids
}

func TestSnapshotOfARunningSandboxLeavesItRunning(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	ask(t, s, sb.ID, "set at the snapshot")
	before := ask(t, s, sb.ID, "stat")
	sn := snapshot(t, s, sb.ID, "of-running")
	if sn.Type != "snapshot" || sn.VCPUs != sb.VCPUs || sn.MemoryMB != sb.MemoryMB || sn.SizeBytes <= 0 || sn.Generation < 1 || sn.Parent != warm {
		t.Errorf("the snapshot is %+v", sn)
	}
	after := ask(t, s, sb.ID, "stat")
	if after.PID != before.PID || after.Born != before.Born {
		t.Errorf("another process answers in the source: %+v, was %+v", after, before)
	}
	if !harness.Eventually(time.Minute, func() bool { return ask(t, s, sb.ID, "stat").Counter > after.Counter }) {
		t.Error("the source's counter stands still")
	}
	clockIsRight(t, s, sb.ID)
	if now, err := s.GetSandbox(t.Context(), sb.ID); err != nil || now.Status != client.StatusRunning {
		t.Errorf("the source is %+v, %v", now, err)
	}
	// What the source does now is not in the snapshot, and the source can be
	// paused, which builds on the snapshot's images.
	ask(t, s, sb.ID, "set after the snapshot")
	pause(t, s, sb.ID)
	resume(t, s, sb.ID)
	if a := ask(t, s, sb.ID, "stat"); a.Value != "after the snapshot" || a.Made != before.Made {
		t.Errorf("the source after a pause: %+v", a)
	}
	clone := spawnAll(t, s, "of-running", 1)[0]
	if a := ask(t, s, clone, "stat"); a.Value != "at the snapshot" || a.Born != before.Born || a.Made != before.Made {
		t.Errorf("the clone: %+v", a)
	}
}

func TestSnapshotOfAPausedSandboxLeavesItPaused(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	ask(t, s, sb.ID, "set while paused")
	sh(t, s, sb.ID, "echo on disk > /home/user/note")
	pause(t, s, sb.ID)
	snapshot(t, s, sb.ID, "of-paused")
	if now, err := s.GetSandbox(t.Context(), sb.ID); err != nil || now.Status != client.StatusPaused {
		t.Errorf("the source is %+v, %v", now, err)
	}
	// Without the source the clone is still whole.
	if err := s.DeleteSandbox(timeout(t, time.Minute), sb.ID); err != nil {
		t.Fatal(err)
	}
	clone := spawnAll(t, s, "of-paused", 1)[0]
	if a := ask(t, s, clone, "stat"); a.Value != "while paused" {
		t.Errorf("the clone: %+v", a)
	}
	if out := sh(t, s, clone, "cat /home/user/note"); out != "on disk" {
		t.Errorf("the clone's disk: %q", out)
	}
}

// identity is what makes an individual.
type identity struct{ hostname, machineID, random, uuid, generation string }

func identityOf(t *testing.T, s *harness.Server, id string) identity {
	t.Helper()
	f := strings.Split(sh(t, s, id, `hostname; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n'; echo
		cat /proc/sys/kernel/random/uuid; cat /run/wrenn/generation; echo`), "\n")
	if len(f) < 5 {
		t.Fatalf("the identity of %s is %q", id, f)
	}
	return identity{f[0], f[1], f[2], f[3], f[4]}
}

func TestClonesAreIndividualsThatDoNotTouchEachOther(t *testing.T) {
	s := server(t)
	ids := spawnAll(t, s, warm, 3)
	seen := map[string]string{}
	var born string
	for _, id := range ids {
		who := identityOf(t, s, id)
		if who.hostname != id {
			t.Errorf("%s calls itself %s", id, who.hostname)
		}
		for what, v := range map[string]string{"hostname": who.hostname, "machine-id": who.machineID, "urandom": who.random, "uuid": who.uuid, "generation": who.generation} {
			if len(v) < 8 {
				t.Errorf("%s of %s is %q", what, id, v)
			}
			if other := seen[what+v]; other != "" {
				t.Errorf("%s and %s have the same %s %s", id, other, what, v)
			}
			seen[what+v] = id
		}
		a := ask(t, s, id, "stat")
		if born == "" {
			born = a.Born
		}
		if a.Born != born || a.Value != "first" {
			t.Errorf("%s: the frozen process does not answer: %+v", id, a)
		}
	}
	// Writes to memory and disk, first to all, then looked at in all.
	for _, id := range ids {
		ask(t, s, id, "set "+id)
		ask(t, s, id, "remake")
		sh(t, s, id, "echo "+id+" > /home/user/mine; sync; sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches'")
	}
	made := map[string]string{}
	for _, id := range append(ids, spawnAll(t, s, warm, 1)...) {
		a := ask(t, s, id, "stat")
		if made[a.Made] != "" {
			t.Errorf("%s and %s hold the same data", id, made[a.Made])
		}
		made[a.Made] = id
		want := id
		if id != ids[0] && id != ids[1] && id != ids[2] {
			want = "first" // made afterwards: the snapshot itself is unchanged
			if out := sh(t, s, id, "cat /home/user/mine || echo none"); out != "none" {
				t.Errorf("a write to a clone's disk reached the snapshot: %s", out)
			}
		} else if out := sh(t, s, id, "cat /home/user/mine"); out != id {
			t.Errorf("%s has the file of %s", id, out)
		}
		if a.Value != want {
			t.Errorf("%s remembers %q, want %q", id, a.Value, want)
		}
	}
}

func TestDeletingASnapshotBreaksNoClone(t *testing.T) {
	s := server(t)
	src := spawn(t, s)
	made := ask(t, s, src.ID, "remake").Made
	sh(t, s, src.ID, "head -c 4M /dev/urandom > /home/user/data; md5sum /home/user/data > /home/user/sums")
	snapshot(t, s, src.ID, "doomed")
	if err := s.DeleteSandbox(timeout(t, time.Minute), src.ID); err != nil {
		t.Fatal(err)
	}
	ids := spawnAll(t, s, "doomed", 2)
	pause(t, s, ids[1])
	if err := s.DeleteSnapshot(timeout(t, time.Minute), "doomed"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateSandbox(t.Context(), client.CreateSandboxRequest{Template: "doomed"}); !client.IsNotFound(err) {
		t.Errorf("create from a deleted snapshot: %v, want not_found", err)
	}
	resume(t, s, ids[1])
	for range 2 {
		for _, id := range ids {
			if a := ask(t, s, id, "stat"); a.Made != made {
				t.Errorf("%s holds other data: %+v", id, a)
			}
			sh(t, s, id, "sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches'; cd /home/user && md5sum --quiet -c sums")
			pause(t, s, id)
			resume(t, s, id)
		}
	}
}

func TestASnapshotFixesTheSize(t *testing.T) {
	s := server(t)
	for body, field := range map[string]string{
		`{"template":"warm","vcpus":2}`:                "vcpus",
		`{"template":"warm","memory_mb":1024}`:         "memory_mb",
		`{"template":"warm","vcpus":1,"memory_mb":99}`: "memory_mb",
	} {
		status, answer := raw(t, s, "POST", "/v1/sandboxes", body)
		if status != 400 || !strings.Contains(answer, "invalid_request") || !strings.Contains(answer, field) {
			t.Errorf("%s: %d %s", body, status, answer)
		}
		if field != "memory_mb" && (!strings.Contains(answer, "512") || !strings.Contains(answer, "1")) {
			t.Errorf("%s: the answer does not name the fixed values: %s", body, answer)
		}
	}
	create(t, s, client.CreateSandboxRequest{Template: warm, VCPUs: 1, MemoryMB: 512})
}

func TestForksGoOnFromThePresentState(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	ask(t, s, sb.ID, "set before the fork")
	children, err := s.ForkSandbox(timeout(t, 2*time.Minute), sb.ID, 2)
	for _, c := range children {
		t.Cleanup(func() { remove(t, s, c.ID) })
	}
	if err != nil || len(children) != 2 {
		t.Fatalf("fork: %d children, %v", len(children), err)
	}
	seen := map[string]bool{identityOf(t, s, sb.ID).machineID: true}
	for _, c := range children {
		if a := ask(t, s, c.ID, "stat"); a.Value != "before the fork" {
			t.Errorf("child %s remembers %q", c.ID, a.Value)
		}
		who := identityOf(t, s, c.ID)
		if seen[who.machineID] || who.hostname != c.ID {
			t.Errorf("child %s is no individual: %+v", c.ID, who)
		}
		seen[who.machineID] = true
	}
	if a := ask(t, s, sb.ID, "stat"); a.Value != "before the fork" {
		t.Errorf("the source remembers %q", a.Value)
	}
	page, err := s.ListSnapshots(t.Context(), client.ListSnapshotsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, sn := range page.Snapshots {
		if strings.Contains(sn.Name, sb.ID) || strings.Contains(sn.Name, "fork") {
			t.Errorf("the fork left the snapshot %s", sn.Name)
		}
	}
}
