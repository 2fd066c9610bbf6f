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

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// vmRig is an ownRig on the real Firecracker, whose guest is vmmtest's.
func vmRig(t *testing.T) *ownRig {
	t.Helper()
	vmmtest.RequireKVM(t)
	return newRigOn(t, nil, firecracker.Options{Direct: true}, BaseFiles{Kernel: vmmtest.Vmlinux(t), Initrd: vmmtest.Initrd(t)})
}

// alone is a Firecracker that nobody drives but the test.
type alone struct {
	cmd     *exec.Cmd
	http    *http.Client
	console string
}

func startAlone(t *testing.T) *alone {
	t.Helper()
	dir, err := os.MkdirTemp("", "alone")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	a := &alone{console: filepath.Join(dir, "console")}
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

// call asks until somebody answers.
func (a *alone) call(t *testing.T, method, path, body string) {
	t.Helper()
	for {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://firecracker"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := a.http.Do(req)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
			time.Sleep(time.Millisecond) // the socket appears without an event
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
	a.call(t, "PUT", "/snapshot/load", fmt.Sprintf(
		`{"snapshot_path":%q,"enable_diff_snapshots":true,"mem_backend":{"backend_type":"File","backend_path":%q}}`, state, memory))
	a.call(t, "PATCH", "/vm", `{"state":"Resumed"}`)
}

// awaitTick returns when the guest has written a whole line more than was there.
func awaitTick(t *testing.T, console string, had int) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		b, _ := os.ReadFile(console)
		if bytes.Count(b, []byte(" sum=ok")) > had {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the guest does not tick: %.500s", b)
		}
		time.Sleep(time.Millisecond) // the guest has no other way to be heard
	}
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

// TestVMResumeBesideFirecrackersOwnLoad measures, in turn, our resume of a
// paused sandbox and a Firecracker that loads the same state and memory by
// itself, each until it runs and until its guest has spoken. It judges nothing:
// `make bench` prints what it tells.
func TestVMResumeBesideFirecrackersOwnLoad(t *testing.T) {
	if os.Getenv("WRENN_BENCH") != "1" {
		t.Skip("skipped: it measures; make bench runs it")
	}
	r := vmRig(t)
	_, _, err := r.Create(t.Context(), CreateSpec{ID: "a", Template: "base", MemoryMB: 128})
	r.must(err)
	console := filepath.Join(r.opts.Dir, "sandboxes", "a", consoleName)
	awaitTick(t, console, 5)
	var ours, own, oursTick, ownTick []time.Duration
	for i := range 6 {
		r.must(r.pause("a"))
		m, err := r.opts.Store.Manifest(r.sandboxes["a"].journal().Manifest)
		r.must(err)
		state, err := r.opts.Store.StatePath(m.ID)
		r.must(err)
		memory, err := os.Create(filepath.Join(r.opts.Dir, "memory"))
		r.must(err)
		r.must(memory.Truncate(128 << 20))
		r.dump(m, memory)
		r.must(memory.Close())

		began := time.Now()
		a := startAlone(t)
		a.load(t, state, memory.Name())
		loaded := time.Since(began)
		awaitTick(t, a.console, 0)
		spoke := time.Since(began)
		a.end()

		had := ticksIn(console)
		began = time.Now()
		r.must(r.resume("a"))
		resumed := time.Since(began)
		awaitTick(t, console, had)
		if i > 0 { // the first warms both up
			own, ownTick = append(own, loaded), append(ownTick, spoke)
			ours, oursTick = append(ours, resumed), append(oursTick, time.Since(began))
		}
	}
	for name, d := range map[string][]time.Duration{"ours-runs": ours, "own-runs": own, "ours-speaks": oursTick, "own-speaks": ownTick} {
		t.Logf("FIGURE %s %v of %v", name, median(d).Round(time.Millisecond), d)
	}
	r.must(r.Destroy(t.Context(), "a"))
}

// TestVMClonesOnAFile measures what ADR 11 compares: two clones of one snapshot
// by copies of pages, and two by Firecracker's File backend on an image that is
// whole in shared memory.
func TestVMClonesOnAFile(t *testing.T) {
	if os.Getenv("WRENN_BENCH") != "1" {
		t.Skip("skipped: it measures; docs/adr/0011-firecracker.md tells the result")
	}
	r := vmRig(t)
	_, _, err := r.Create(t.Context(), CreateSpec{ID: "a", Template: "base", MemoryMB: 128})
	r.must(err)
	awaitTick(t, filepath.Join(r.opts.Dir, "sandboxes", "a", consoleName), 5)
	m, _, err := r.Snapshot(t.Context(), "a", "s")
	r.must(err)
	r.must(r.Destroy(t.Context(), "a"))
	state, err := r.opts.Store.StatePath(m.ID)
	r.must(err)

	for _, id := range []string{"b", "c"} {
		began := time.Now()
		_, _, err := r.Create(t.Context(), CreateSpec{ID: id, Template: "s"})
		r.must(err)
		awaitTick(t, filepath.Join(r.opts.Dir, "sandboxes", id, consoleName), 10)
		pid := r.sandboxes[id].current().machine.PID()
		t.Logf("FIGURE copy: clone %s ticks 10 times after %v, has Pss %d KiB, of it anonymous %d KiB", id, time.Since(began).Round(time.Millisecond), rollup(t, pid, "Pss"), rollup(t, pid, "Pss_Anon"))
	}
	r.must(r.Destroy(t.Context(), "b"))
	r.must(r.Destroy(t.Context(), "c"))

	began := time.Now()
	fd, err := unix.MemfdCreate("shared", unix.MFD_CLOEXEC)
	r.must(err)
	shared := os.NewFile(uintptr(fd), "shared")
	defer shared.Close()
	r.must(shared.Truncate(128 << 20))
	r.dump(m, shared)
	var st unix.Stat_t
	r.must(unix.Fstat(fd, &st))
	t.Logf("FIGURE file: made whole in %v, has %d KiB", time.Since(began).Round(time.Millisecond), st.Blocks/2)
	var clones []*alone
	for range 2 {
		began := time.Now()
		a := startAlone(t)
		a.load(t, state, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd))
		awaitTick(t, a.console, 10)
		t.Logf("FIGURE file: a clone ticks 10 times after %v", time.Since(began).Round(time.Millisecond))
		clones = append(clones, a)
	}
	for _, a := range clones {
		t.Logf("FIGURE file: Pss %d KiB, of it anonymous %d KiB", rollup(t, a.cmd.Process.Pid, "Pss"), rollup(t, a.cmd.Process.Pid, "Pss_Anon"))
	}
}
