package engine

import (
	"bytes"
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
func (a *alone) load(t *testing.T, state, memory string) {
	t.Helper()
	a.call(t, "GET", "/version", "")
	up := time.Now()
	a.call(t, "PUT", "/snapshot/load", fmt.Sprintf(
		`{"snapshot_path":%q,"enable_diff_snapshots":true,"mem_backend":{"backend_type":"File","backend_path":%q}}`, state, memory))
	a.call(t, "PATCH", "/vm", `{"state":"Resumed"}`)
	t.Logf("its own load: %v of its two calls", time.Since(up))
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

func median(d []time.Duration) time.Duration { return slices.Sorted(slices.Values(d))[len(d)/2] }

// against collects how long it takes us, and a Firecracker that nobody drives,
// from nothing (both start the process, neither with jailer) until the machine
// runs and until its guest has spoken; and us until our call returns, in which a
// stand-in for the guest's agent confirms its identity, too.
type against struct {
	rig                                     *ownRig
	ours, own, oursTick, ownTick, oursReady []time.Duration
}

// rounds is how often each is measured; the first round warms both up.
const rounds = 6

// load lets a Firecracker load the same state and memory by itself. In a nested
// machine a guest hangs now and then, with nothing of ours in it: that is no
// measurement.
func (a *against) load(t *testing.T, state, memory string) {
	t.Helper()
	for range 3 {
		began := time.Now()
		fc := startAlone(t)
		fc.load(t, state, memory)
		runs := time.Since(began)
		spoke := ticks(fc.console, 0)
		speaks := time.Since(began)
		fc.end()
		if spoke {
			a.own, a.ownTick = append(a.own, runs), append(a.ownTick, speaks)
			return
		}
		t.Log("a guest that Firecracker loaded by itself hangs")
	}
	t.Fatal("no guest that Firecracker loads by itself ticks")
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
	fmt.Printf("began %s\n", began.Format("05.000"))
	t.Logf("ours: %v until it runs, %v until it speaks, %d faults; by parts: %v",
		a.ours[len(a.ours)-1], a.oursTick[len(a.oursTick)-1], st.Msg.Faults, stats.Phases)
}

// tell prints the figures, for `make bench` to find.
func (a *against) tell(t *testing.T, what string) {
	for name, d := range map[string][]time.Duration{
		"ours-runs": a.ours, "own-runs": a.own, "ours-speaks": a.oursTick, "own-speaks": a.ownTick, "ours-ready": a.oursReady,
	} {
		d = d[1:]
		t.Logf("FIGURE %s-%s %v of %v", what, name, median(d).Round(time.Millisecond), d)
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
	_, _, err := r.Create(t.Context(), CreateSpec{ID: "a", Template: "base", MemoryMB: 128})
	r.must(err)
	console := filepath.Join(r.opts.Dir, "sandboxes", "a", consoleName)
	awaitTick(t, console, 5)
	resume := against{rig: r}
	for range rounds {
		r.must(r.pause("a"))
		m, err := r.opts.Store.Manifest(r.sandboxes["a"].journal().Manifest)
		r.must(err)
		resume.load(t, r.stateFile(m), r.memoryFile(m))
		resume.start(t, "a", func() (Stats, error) {
			_, s, err := r.Resume(t.Context(), "a", false)
			return s, err
		})
	}
	resume.tell(t, "resume")

	m, _, err := r.Snapshot(t.Context(), "a", "s")
	r.must(err)
	r.must(r.Destroy(t.Context(), "a"))
	m, err = r.opts.Store.Manifest(m.ID) // a compaction may have given it another image
	r.must(err)
	clone := against{rig: r}
	memory := r.memoryFile(m)
	for i := range rounds {
		clone.load(t, r.stateFile(m), memory)
		id := fmt.Sprintf("c%d", i)
		clone.start(t, id, func() (Stats, error) {
			_, s, err := r.Create(t.Context(), CreateSpec{ID: id, Template: "s"})
			return s, err
		})
		if i < rounds-2 { // the last two live at one time
			r.must(r.Destroy(t.Context(), id))
		}
	}
	clone.tell(t, "clone")
	for _, id := range []string{"c4", "c5"} {
		awaitTick(t, filepath.Join(r.opts.Dir, "sandboxes", id, consoleName), 10)
		pid := r.sandboxes[id].current().machine.PID()
		t.Logf("clone %s has Pss %d KiB, of it anonymous %d KiB", id, rollup(t, pid, "Pss"), rollup(t, pid, "Pss_Anon"))
		r.must(r.Destroy(t.Context(), id))
	}
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
