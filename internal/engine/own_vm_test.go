package engine

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// vmRig is an ownRig on the real Firecracker, whose guest is vmmtest's. It notes
// when a machine began to run.
func vmRig(t *testing.T) *ownRig {
	t.Helper()
	vmmtest.RequireKVM(t)
	spares, err := os.MkdirTemp("", "ahead") // short: sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(spares) })
	r := newRigOn(t, nil, firecracker.Options{Direct: true, SpareDir: spares}, BaseFiles{Kernel: vmmtest.Vmlinux(t), Initrd: vmmtest.Initrd(t)})
	r.Engine.opts.AfterStep = func(_ Op, step string) error {
		if step == "vm_run" {
			r.ran = time.Now()
		}
		return nil
	}
	return r
}

// alone is a Firecracker that nobody drives but the test.
type alone struct {
	cmd             *exec.Cmd
	http            *http.Client
	socket, console string
}

func startAlone(t *testing.T) *alone {
	t.Helper()
	dir, err := os.MkdirTemp("", "alone")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	a := &alone{socket: socket, console: filepath.Join(dir, "console")}
	out, err := os.Create(a.console)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	a.cmd = exec.Command("firecracker", "--id", "alone", "--api-sock", socket)
	a.cmd.Stdout = out
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.end)
	a.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	return a
}

func (a *alone) end() {
	if a.cmd.ProcessState == nil {
		_ = a.cmd.Process.Kill()
		_ = a.cmd.Wait()
	}
}

// call asks when there is somebody to ask.
func (a *alone) call(t *testing.T, method, path, body string) {
	t.Helper()
	var st unix.Stat_t
	for unix.Lstat(a.socket, &st) != nil {
		time.Sleep(time.Millisecond) // the socket appears without an event
	}
	for {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://firecracker"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := a.http.Do(req)
		if errors.Is(err, unix.ECONNREFUSED) { // and takes calls a moment later
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode >= 300 {
			t.Fatalf("%s %s: %d %s", method, path, res.StatusCode, b)
		}
		return
	}
}

// load restores a machine as Firecracker's manual says, from a memory file.
func (a *alone) load(t *testing.T, state, memory string) (calls time.Duration) {
	t.Helper()
	a.call(t, "GET", "/version", "")
	up := time.Now()
	a.call(t, "PUT", "/snapshot/load", fmt.Sprintf(
		`{"snapshot_path":%q,"enable_diff_snapshots":true,"mem_backend":{"backend_type":"File","backend_path":%q}}`, state, memory))
	a.call(t, "PATCH", "/vm", `{"state":"Resumed"}`)
	return time.Since(up)
}

// awaitTick returns when the guest has written a whole line more than was there.
func awaitTick(t *testing.T, console string, had int) {
	t.Helper()
	if !ticks(console, had) {
		b, _ := os.ReadFile(console)
		t.Fatalf("the guest does not tick: %.500s", b)
	}
}

func ticks(console string, had int) bool {
	for deadline := time.Now().Add(20 * time.Second); ticksIn(console) <= had; {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(time.Millisecond) // the guest has no other way to be heard
	}
	return true
}

func ticksIn(console string) int {
	b, _ := os.ReadFile(console)
	return bytes.Count(b, []byte(" sum=ok"))
}

// dump writes a memory image out whole.
func (r *ownRig) dump(m snapshot.Manifest, to io.WriterAt) {
	r.t.Helper()
	image, err := r.opts.Store.OpenImage(m.Memory.ID)
	r.must(err)
	defer image.Close()
	buf := make([]byte, 1<<20)
	zeros := make([]byte, len(buf))
	for off := int64(0); off < image.Size(); off += int64(len(buf)) {
		_, err := image.ReadAt(buf, off)
		r.must(err)
		if !bytes.Equal(buf, zeros) { // both kinds of file begin as one hole
			_, err = to.WriteAt(buf, off)
			r.must(err)
		}
	}
}

// rollup reads a figure of /proc/<pid>/smaps_rollup, KiB.
func rollup(t *testing.T, pid int, name string) (kb int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			fmt.Sscan(v, &kb)
		}
	}
	return kb
}

func median[T cmp.Ordered](d []T) T { return slices.Sorted(slices.Values(d))[len(d)/2] }

// against collects how long it takes us, and a Firecracker that nobody drives,
// until the machine runs and until its guest has spoken; and us until our call
// returns, in which a stand-in for the guest's agent confirms its identity, too.
// Its own load begins with nothing, and ownCalls are what it takes where the
// process waits already, as ours does for each prepared network slot. Neither is
// started by jailer.
type against struct {
	rig                                               *ownRig
	ours, own, ownCalls, oursTick, ownTick, oursReady []time.Duration
}

// rounds is how often each is measured; the first round warms both up.
const rounds = 16

// load lets a Firecracker load the same state and memory by itself. In a nested
// machine a guest hangs now and then, from some saved states each time, with
// nothing of ours in it: that is no measurement.
func (a *against) load(t *testing.T, state, memory string) bool {
	t.Helper()
	began := time.Now()
	fc := startAlone(t)
	defer fc.end()
	calls := fc.load(t, state, memory)
	runs := time.Since(began)
	if !ticks(fc.console, 0) {
		t.Log("a guest that Firecracker loaded by itself hangs")
		return false
	}
	a.own, a.ownCalls, a.ownTick = append(a.own, runs), append(a.ownCalls, calls), append(a.ownTick, time.Since(began))
	return true
}

// start is our turn.
func (a *against) start(t *testing.T, id string, start func() (Stats, error)) {
	t.Helper()
	console := filepath.Join(a.rig.opts.Dir, "sandboxes", id, consoleName)
	had := ticksIn(console)
	// As for each network slot that is kept prepared.
	d := a.rig.opts.Driver.(vmm.Warmer)
	if err := d.Warm(t.Context(), "", fakeSlot{}.Index()); err != nil {
		t.Fatal(err)
	}
	defer d.Cool(fakeSlot{}.Index())
	began := time.Now()
	stats, err := start()
	if err != nil {
		t.Fatal(err)
	}
	a.oursReady = append(a.oursReady, time.Since(began))
	a.ours = append(a.ours, a.rig.ran.Sub(began))
	awaitTick(t, console, had)
	a.oursTick = append(a.oursTick, time.Since(began))
	st, err := a.rig.opts.Pager.GetStats(t.Context(), connect.NewRequest(&pagerv1.GetStatsRequest{SandboxId: id}))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("ours: %v until it runs, %v until it speaks, %d faults; by parts: %v",
		a.ours[len(a.ours)-1], a.oursTick[len(a.oursTick)-1], st.Msg.Faults, stats.Phases)
}

// tell prints the figures, for `make bench` to find: medians, without the first
// round, which warms both up. A ratio is the median of those of ours and its own of
// one round: the host's speed changes, but seldom within one.
func (a *against) tell(t *testing.T, what string) {
	for name, d := range map[string][]time.Duration{
		"ours-runs": a.ours, "own-runs": a.own, "own-calls": a.ownCalls, "ours-speaks": a.oursTick, "own-speaks": a.ownTick, "ours-ready": a.oursReady,
	} {
		t.Logf("FIGURE %s-%s %v of %v", what, name, median(d[1:]).Round(time.Millisecond), d[1:])
	}
	for name, of := range map[string][2][]time.Duration{
		"runs": {a.ours, a.own}, "calls": {a.ours, a.ownCalls}, "speaks": {a.oursTick, a.ownTick},
	} {
		var r []float64
		for i := 1; i < len(a.own); i++ {
			r = append(r, float64(of[0][i])/float64(of[1][i]))
		}
		t.Logf("RATIO %s-%s %.2f of %.2f", what, name, median(r), r)
	}
}

// TestVMResumeBesideFirecrackersOwnLoad measures in turn, in one run: a resume
// of a paused sandbox and Firecracker's own load of the same state and memory,
// and a clone of a named snapshot and Firecracker's own load of that. It judges
// nothing: `make bench` prints what it tells.
func TestVMResumeBesideFirecrackersOwnLoad(t *testing.T) {
	if os.Getenv("WRENN_BENCH") != "1" {
		t.Skip("skipped: it measures; make bench runs it")
	}
	r := vmRig(t)
	r.createTicking("a")
	resume := against{rig: r}
	for tries := 0; len(resume.own) < rounds; tries++ {
		if tries == 2*rounds {
			t.Fatal("too many guests hang")
		}
		r.must(r.pause("a"))
		m := r.settled(r.sandboxes["a"].journal().Manifest)
		if !resume.load(t, r.stateFile(m), r.memoryFile(m)) {
			r.goOn("a")
			continue
		}
		resume.start(t, "a", func() (Stats, error) {
			_, s, err := r.Resume(t.Context(), "a", false)
			return s, err
		})
	}
	resume.tell(t, "resume")

	clone := against{rig: r}
	state, memory := "", ""
	for tries := 0; len(clone.own) < rounds; tries++ {
		if tries == 2*rounds {
			t.Fatal("too many guests hang")
		}
		i := len(clone.own)
		if i == 0 {
			state, memory = r.snapshotAnew()
		}
		if !clone.load(t, state, memory) {
			continue
		}
		id := fmt.Sprintf("c%d", i)
		clone.start(t, id, func() (Stats, error) {
			_, s, err := r.Create(t.Context(), CreateSpec{ID: id, Template: "s"})
			return s, err
		})
		if i < rounds-2 { // the last two live at one time
			r.must(r.Destroy(t.Context(), id))
		}
	}
	r.must(r.Destroy(t.Context(), "a"))
	clone.tell(t, "clone")
	for _, id := range []string{fmt.Sprintf("c%d", rounds-2), fmt.Sprintf("c%d", rounds-1)} {
		awaitTick(t, filepath.Join(r.opts.Dir, "sandboxes", id, consoleName), 10)
		pid := r.sandboxes[id].current().machine.PID()
		t.Logf("clone %s has Pss %d KiB, of it anonymous %d KiB", id, rollup(t, pid, "Pss"), rollup(t, pid, "Pss_Anon"))
		r.must(r.Destroy(t.Context(), id))
	}
}

func (r *ownRig) createTicking(id string) {
	r.t.Helper()
	_, _, err := r.Create(r.t.Context(), CreateSpec{ID: id, Template: "base", MemoryMB: 128})
	r.must(err)
	awaitTick(r.t, filepath.Join(r.opts.Dir, "sandboxes", id, consoleName), 5)
}

// goOn resumes a sandbox from a state that Firecracker's own load hangs from, and
// tells whether ours does, too; then there is another guest.
func (r *ownRig) goOn(id string) {
	r.t.Helper()
	console := filepath.Join(r.opts.Dir, "sandboxes", id, consoleName)
	had := ticksIn(console)
	_, _, err := r.Resume(r.t.Context(), id, false)
	r.must(err)
	if ticks(console, had) {
		r.t.Log("resumed by us it goes on")
		return
	}
	r.t.Log("resumed by us it hangs, too")
	r.must(r.Destroy(r.t.Context(), id))
	r.createTicking(id)
}

// snapshotAnew makes the snapshot s of a, in place of one that there was, and
// returns what Firecracker loads it from.
func (r *ownRig) snapshotAnew() (state, memory string) {
	r.t.Helper()
	ctx := r.t.Context()
	if err := r.DeleteSnapshot(ctx, "s"); err != nil && !errors.Is(err, ErrNotFound) {
		r.t.Fatal(err)
	}
	m, _, err := r.Snapshot(ctx, "a", "s")
	r.must(err)
	m = r.settled(m.ID)
	return r.stateFile(m), r.memoryFile(m)
}

// settled returns a manifest when no compaction will give it another image.
func (r *ownRig) settled(id format.ID) snapshot.Manifest {
	r.t.Helper()
	for !r.Idle() {
		time.Sleep(time.Millisecond)
	}
	m, err := r.opts.Store.Manifest(id)
	r.must(err)
	return m
}

// memoryFile has the memory of a snapshot as Firecracker's manual wants it.
func (r *ownRig) memoryFile(m snapshot.Manifest) string {
	r.t.Helper()
	f, err := os.Create(filepath.Join(r.opts.Dir, "own.memory"))
	r.must(err)
	defer f.Close()
	r.must(f.Truncate(int64(m.VMM.MemoryMB) << 20))
	r.dump(m, f)
	return f.Name()
}

func (r *ownRig) stateFile(m snapshot.Manifest) string {
	r.t.Helper()
	path, err := r.opts.Store.StatePath(m.ID)
	r.must(err)
	return path
}
