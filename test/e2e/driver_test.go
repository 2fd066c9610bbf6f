package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// This test also runs in the nested machine (test/nested), where a guest's
// processor is emulated twice and every program that it starts costs seconds:
// most of what is asked of the guest is asked of its agent alone.

// worker holds data in memory (a tmpfs is nothing else) and on disk, and a
// process that counts.
type worker struct {
	id   string
	sums string            // of all data, as the guest made them
	last map[string][]byte // what was put last, by path
	n    int               // how far its process had counted
}

// startWorker makes the data that stays, and a shell that counts and starts
// nothing else.
const startWorker = `mkdir -p /dev/shm/w /home/user/w && mkfifo /dev/shm/never
	for d in /dev/shm/w /home/user/w; do head -c 1M /dev/urandom > $d/fixed; done
	echo 0 > /dev/shm/count
	setsid bash -c 'n=0; while :; do n=$((n+1)); echo $n > /dev/shm/count; read -t 1 -u 9; done 9<>/dev/shm/never' >/dev/null 2>&1 </dev/null &
	echo $! > /dev/shm/pid; md5sum /dev/shm/w/fixed /home/user/w/fixed`

// put replaces some of the data in memory and on disk.
func (w *worker) put(t *testing.T, s *harness.Server, seed int) {
	t.Helper()
	w.last = map[string][]byte{}
	for i, dir := range []string{"/dev/shm/w", "/home/user/w"} {
		b, err := io.ReadAll(randomReader(uint64(2*seed+i), 100<<10))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.PutFile(timeout(t, 2*time.Minute), w.id, dir+"/changing", bytes.NewReader(b), client.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		w.last[dir+"/changing"] = b
	}
}

func (w *worker) get(t *testing.T, s *harness.Server, path string) []byte {
	t.Helper()
	f, err := s.GetFile(timeout(t, 2*time.Minute), w.id, path, "")
	if err != nil {
		t.Fatalf("%s of %s: %v", path, w.id, err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatalf("%s of %s: %v", path, w.id, err)
	}
	return b
}

// check compares what the guest has now with what it had, and wants its process
// to have gone on from where it was.
func (w *worker) check(t *testing.T, s *harness.Server, when string) {
	t.Helper()
	for path, want := range w.last {
		if got := w.get(t, s, path); !bytes.Equal(got, want) {
			t.Fatalf("%s: %s of %s is not what was put there: %d bytes", when, path, w.id, len(got))
		}
	}
	var n int
	if !harness.Eventually(time.Minute, func() bool {
		n, _ = strconv.Atoi(strings.TrimSpace(string(w.get(t, s, "/dev/shm/count"))))
		return n > w.n
	}) {
		t.Fatalf("%s: the process in %s stands still at %d, was at %d", when, w.id, n, w.n)
	}
	w.n = n
}

// checkSums has the guest itself compare all that it has with its checksums,
// the disk past its own cache, and its process by its number.
func (w *worker) checkSums(t *testing.T, s *harness.Server, when string) {
	t.Helper()
	out := sh(t, s, w.id, `sync; sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches'
		md5sum /dev/shm/w/fixed /home/user/w/fixed; kill -0 $(cat /dev/shm/pid)`)
	if out != w.sums {
		t.Fatalf("%s: %s has %q, had %q", when, w.id, out, w.sums)
	}
}

// TestEveryDriverDoesTheWholeLifeCycle takes a sandbox, its clones, our server
// and our pager through all that there is, and finds the host clean after it.
func TestEveryDriverDoesTheWholeLifeCycle(t *testing.T) {
	s := ownServer(t, "--network-prefix", ownPrefix)
	w := &worker{id: create(t, s, client.CreateSandboxRequest{MemoryMB: 256}).ID}
	w.sums = sh(t, s, w.id, startWorker)
	for g := 1; g <= 10; g++ {
		w.put(t, s, g)
		pause(t, s, w.id)
		if vm := s.VM(w.id); vm != nil {
			t.Fatalf("generation %d: process %d of the paused sandbox lives", g, vm.PID)
		}
		resume(t, s, w.id)
		w.check(t, s, fmt.Sprintf("generation %d", g))
	}
	w.checkSums(t, s, "generation 10")
	w.check(t, s, "generation 10, from the disk itself")
	fullDisk(t, s, w)

	if _, err := s.CreateSnapshot(timeout(t, 3*time.Minute), w.id, "frozen"); err != nil {
		t.Fatal(err)
	}
	workers := []*worker{w}
	for _, id := range spawnAll(t, s, "frozen", 2) {
		c := *w
		c.id = id
		workers = append(workers, &c)
	}
	for i, c := range workers { // each its own way from here
		c.check(t, s, "after the snapshot")
		c.put(t, s, 20+i)
	}
	disksDiffer(t, s, workers)
	clonesShare(t, s, workers[1:])

	alive := processesOf(t, s, workers)
	s.Kill()
	restart(t, s, w.id)
	sameProcesses(t, s, workers, alive, "kill -9 of the server")

	old := s.Pager()
	old.Kill()
	if !harness.Eventually(time.Minute, func() bool { n := s.Pager(); return n != nil && n.PID != old.PID }) {
		t.Fatal("no new pager comes up")
	}
	sameProcesses(t, s, workers, alive, "kill -9 of the pager")
	clonesShare(t, s, workers[1:])
	pause(t, s, workers[1].id)
	resume(t, s, workers[1].id)
	workers[1].check(t, s, "a clone's own pause and resume")
	waitsForRoom(t, s, w)

	for _, c := range workers {
		c.checkSums(t, s, "at the end")
		c.check(t, s, "at the end, from the disk itself")
		if err := s.DeleteSandbox(timeout(t, time.Minute), c.id); err != nil {
			t.Errorf("delete %s: %v", c.id, err)
		}
	}
	if err := s.DeleteSnapshot(timeout(t, time.Minute), "frozen"); err != nil {
		t.Errorf("delete the snapshot: %v", err)
	}
	if left := names(t, filepath.Join(s.Dir, "sandboxes")); len(left) != 0 {
		t.Errorf("directories of deleted sandboxes: %v", left)
	}
	if err := s.Stop(); err != nil {
		t.Fatalf("end: %v", err)
	}
	nothingNames(t, s.Dir)
	noDevices(t, s.Dir)
}

// fullDisk: where the VMM itself writes the memory, its disk really is full, on a
// machine that is ours alone. TestAFullDiskDuringAPauseLeavesTheSandboxRunning
// is for VMMs whose memory we write.
func fullDisk(t *testing.T, s *harness.Server, w *worker) {
	t.Helper()
	if os.Getenv("WRENN_TEST_OWN_MACHINE") != "1" {
		return
	}
	sh(t, s, w.id, "yes wrenn | head -c 24M > /dev/shm/large") // in memory
	kept := names(t, filepath.Join(s.Dir, "store", "snapshots"))
	empty := fill(t, s.Dir, 12<<20)
	_, err := s.PauseSandbox(timeout(t, 3*time.Minute), w.id)
	if err == nil || !strings.Contains(err.Error(), "disk") {
		t.Errorf("a pause on a full disk: %v", err)
	}
	if now, err := s.GetSandbox(t.Context(), w.id); err != nil || now.Status != client.StatusRunning {
		t.Fatalf("after a pause on a full disk: %+v, %v", now, err)
	}
	// Where the guest has written to its own disk too, it stands still until then.
	empty()
	w.check(t, s, "after a pause on a full disk")
	if now := names(t, filepath.Join(s.Dir, "store", "snapshots")); !slices.Equal(now, kept) {
		t.Errorf("manifests are %v after a pause on a full disk, were %v", now, kept)
	}
	pause(t, s, w.id)
	resume(t, s, w.id)
	w.check(t, s, "after room was made")
	sh(t, s, w.id, "rm /dev/shm/large")
}

// waitsForRoom: a write of the guest that finds no room on the host's disk waits
// for some, which is told, and a pause is refused meanwhile.
// TestAGuestOnAFullDiskWaitsForRoom has more of it, on VMMs that take part.
func waitsForRoom(t *testing.T, s *harness.Server, w *worker) {
	t.Helper()
	if os.Getenv("WRENN_TEST_OWN_MACHINE") != "1" {
		return
	}
	sh(t, s, w.id, "head -c 6M /dev/urandom > /dev/shm/large")
	empty := fill(t, s.Dir, 8<<20)
	// The answer goes first: a Firecracker whose write waits moves no packets.
	sh(t, s, w.id, `setsid bash -c 'sleep 3; cp /dev/shm/large large && sync large; echo "said $?" > /dev/shm/said' > /dev/null 2>&1 < /dev/null &`)
	eventually(t, 3*time.Minute, "the log says that it waits", func() bool { return strings.HasSuffix(waitEvents(t, s, w.id), "wait") })
	if _, err := s.PauseSandbox(timeout(t, 3*time.Minute), w.id); err == nil || !strings.Contains(err.Error(), "disk") {
		t.Errorf("a pause while the guest waits for room: %v", err)
	}
	empty()
	eventually(t, 3*time.Minute, "the write is done", func() bool {
		f, err := s.GetFile(timeout(t, 2*time.Minute), w.id, "/dev/shm/said", "")
		if err != nil {
			return false
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		return err == nil && string(b) == "said 0\n"
	})
	sh(t, s, w.id, "cmp /dev/shm/large large && rm large /dev/shm/large")
	w.check(t, s, "after a write waited for room")
}

func processesOf(t *testing.T, s *harness.Server, workers []*worker) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, w := range workers {
		vm := s.VM(w.id)
		if vm == nil {
			t.Fatalf("the running sandbox %s has no process", w.id)
		}
		out[w.id] = vm.PID
	}
	return out
}

// sameProcesses: after a crash of ours every guest is where it was.
func sameProcesses(t *testing.T, s *harness.Server, workers []*worker, was map[string]int, when string) {
	t.Helper()
	for i, w := range workers {
		w.check(t, s, when)
		w.put(t, s, 30+i)
		if now := s.VM(w.id); now == nil || now.PID != was[w.id] {
			t.Errorf("%s: the VM of %s was process %d and is %+v", when, w.id, was[w.id], now)
		}
	}
}

// disksDiffer: VMs that are given a block device find it under one path, and
// each finds its own.
func disksDiffer(t *testing.T, s *harness.Server, workers []*worker) {
	t.Helper()
	if harness.Driver() != "firecracker" {
		return
	}
	seen := map[uint64]string{}
	for id, pid := range processesOf(t, s, workers) {
		var st unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/root/tmp/fc-vm/rootfs", pid), &st); err != nil {
			t.Errorf("the disk of %s: %v", id, err)
			continue
		}
		if other := seen[st.Rdev]; other != "" {
			t.Errorf("%s and %s have the same disk, device %#x", id, other, st.Rdev)
		}
		seen[st.Rdev] = id
	}
}

// clonesShare: what clones have of their snapshot's memory and did not write to
// is in RAM once. Each of them has read far more of its kernel than this.
func clonesShare(t *testing.T, s *harness.Server, clones []*worker) {
	t.Helper()
	for id, pid := range processesOf(t, s, clones) {
		shared := 0 // KiB
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
		if err != nil {
			t.Fatal(err)
		}
		var size int
		for line := range strings.Lines(string(b)) {
			var n int
			name, rest, _ := strings.Cut(line, ":")
			if fmt.Sscan(rest, &n); name == "Size" {
				size = n
			} else if strings.HasPrefix(name, "Shared_") && size >= 128<<10 { // guest memory
				shared += n
			}
		}
		if t.Logf("%s shares %d KiB", id, shared); shared < 1<<10 {
			t.Errorf("%s shares %d KiB with the other clone", id, shared)
		}
	}
}

// noDevices looks for what only some drivers take of the host: block devices,
// control groups, mounts.
func noDevices(t *testing.T, dir string) {
	t.Helper()
	backends, _ := filepath.Glob("/sys/block/nbd*/backend")
	for _, b := range backends {
		if name, err := os.ReadFile(b); err == nil {
			t.Errorf("left: %s of %s", filepath.Dir(b), name)
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/wrenn/*/cgroup.procs")
	for _, g := range groups {
		t.Errorf("left: the control group %s", filepath.Dir(g))
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir+"/") {
			t.Errorf("left: the mount %s", line)
		}
	}
	if spaces, err := os.ReadDir("/run/netns"); err == nil && harness.Driver() != "" {
		for _, ns := range spaces { // on a machine that is ours alone
			t.Errorf("left: the network namespace %s", ns.Name())
		}
	}
}

// TestDoctorTellsWhatRunsVMs: what the server under test does, the doctor says
// can be done.
func TestDoctorTellsWhatRunsVMs(t *testing.T) {
	requireHost(t)
	cmd := exec.CommandContext(timeout(t, 5*time.Minute), filepath.Join(harness.Bin(), "wrenn"), "doctor", "--json", "--dir", harness.DevDir())
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("it finds that sandboxes cannot run here: %v\n%s", err, out)
	}
	var report struct {
		Findings []struct{ Check, Status, Found, Remedy string }
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	status := map[string]string{}
	for _, f := range report.Findings {
		status[f.Check] = f.Status
		if f.Status != "ok" && f.Found == "" {
			t.Errorf("%s is %s and nothing is said of it", f.Check, f.Status)
		}
	}
	wanted := []string{"qemu-system-x86_64", "userfaultfd"}
	if harness.Driver() == "firecracker" {
		wanted = []string{"firecracker", "firecracker on KVM", "block devices (nbd)", "userfaultfd"}
	}
	for _, check := range wanted {
		if status[check] != "ok" {
			t.Errorf("%s is %q: %+v", check, status[check], report.Findings)
		}
	}
}
