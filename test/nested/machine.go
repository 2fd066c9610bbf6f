// Package nested runs test binaries in a virtual machine in which /dev/kvm
// works: QEMU emulates a processor with AMD's virtualisation and Debian's cloud
// kernel uses it. It is slow but real, so that Firecracker is tested where no
// processor lends its own. The results come back as results of `go test`.
//
// Only tests import it.
package nested

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// Step is one program to run in the machine.
type Step struct {
	Name string
	Args []string
	Env  []string
	Dir  string
}

// Machine is what to run and on what.
type Machine struct {
	// Tree is the root file system; Run adds to it.
	Tree string
	// DiskMB is the size of the disk it is put on.
	DiskMB   int
	MemoryMB int
	Steps    []Step
	Limit    time.Duration
}

// modules of the nested kernel; what they need comes before them by itself.
var modules = []string{
	"virtio_pci", "virtio_blk", "kvm-amd", "nbd", "tun", "veth",
	"nf_tables", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_reject_inet", "nft_limit",
}

// Run boots the machine, waits until it has done its steps and is off, and
// returns what they printed. On an error the machine did not get so far.
func (m Machine) Run(t testing.TB) ([]byte, error) {
	t.Helper()
	dir := workDir(t)
	b, err := json.Marshal(map[string]any{"Steps": m.Steps})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.Tree, "plan.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "etc", "root", "var/tmp"} {
		if err := os.MkdirAll(filepath.Join(m.Tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	kernel, tree := vmmtest.Kernel(t)
	initrd := filepath.Join(dir, "initrd")
	writeInitrd(t, initrd, tree)
	disk := filepath.Join(dir, "disk")
	command(t, "/usr/sbin:/sbin", "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0",
		"-m", "0", "-d", m.Tree, disk, strconv.Itoa(m.DiskMB)+"M")

	// QEMU's emulated SVM changes a processor's set of pending interrupts without
	// the lock that its devices do it under, so that now and then an interrupt of
	// the machine is forgotten until the next one comes. With timers that are set
	// for once none comes, and time stands still; hence a tick that is periodic.
	// With one processor no interrupt between two is lost, and none of the two can
	// be taken in the middle of a change of the memory map by the other. Without
	// SSE 4.2 checksums come from tables, in a sixth of the time: QEMU computes its
	// instruction for them bit by bit.
	out, console := filepath.Join(dir, "out"), filepath.Join(dir, "console")
	ctx, cancel := context.WithTimeout(t.Context(), m.Limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-M", "q35,usb=off", "-accel", "tcg,thread=single,tb-size=512",
		"-cpu", "EPYC-v2,+svm,+npt,-xsavec,-xsaves,+invtsc,-sse4.2",
		"-smp", "1", "-m", strconv.Itoa(m.MemoryMB), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:"+console, "-serial", "file:"+out,
		"-drive", "file="+disk+",format=raw,if=none,id=d,cache=unsafe,discard=unmap", "-device", "virtio-blk-pci,drive=d",
		"-kernel", kernel, "-initrd", initrd,
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off nohz=off highres=off clocksource=tsc tsc=reliable no_timer_check random.trust_cpu=on")
	said, err := cmd.CombinedOutput()
	got, _ := os.ReadFile(out)
	got = bytes.ReplaceAll(got, []byte("\r\n"), []byte("\n"))
	if c, _ := os.ReadFile(console); len(bytes.TrimSpace(c)) > 0 {
		t.Logf("the nested machine's console:\n%s", tail(c, 8<<10))
	}
	if err != nil {
		err = fmt.Errorf("the nested machine: %w (limit %s)\n%s\nits output ends with:\n%s", err, m.Limit, said, tail(got, 8<<10))
	}
	return got, err
}

// crashed tells whether it was the emulator that ended by itself.
func crashed(err error) bool {
	var e *exec.ExitError
	if !errors.As(err, &e) {
		return false
	}
	ws, ok := e.Sys().(syscall.WaitStatus)
	return ok && ws.Signaled() && (ws.Signal() == syscall.SIGABRT || ws.Signal() == syscall.SIGSEGV)
}

// workDir takes the machine's disk and output. With WRENN_NESTED_DIR it lies in
// that one and stays, for whoever wants to watch or to boot it again by hand.
func workDir(t testing.TB) string {
	dir := os.Getenv("WRENN_NESTED_DIR")
	if dir == "" {
		return t.TempDir()
	}
	dir = filepath.Join(dir, t.Name())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func tail(b []byte, n int) []byte {
	if len(b) > n {
		return b[len(b)-n:]
	}
	return b
}

func writeInitrd(t testing.TB, path, tree string) {
	t.Helper()
	prog := filepath.Join(filepath.Dir(path), "init")
	Build(t, prog, "build", "git.omukk.dev/wrenn/sandbox/test/nested/init")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := cpio.NewWriter(f)
	for _, d := range []string{"dev", "proc", "sys", "root", "modules"} {
		if err := w.WriteHeader(&cpio.Header{Name: d, Mode: cpio.TypeDir | 0o755}); err != nil {
			t.Fatal(err)
		}
	}
	add(t, w, "init", prog)
	for i, m := range moduleFiles(t, tree, modules) {
		add(t, w, fmt.Sprintf("modules/%02d-%s", i, filepath.Base(m)), m)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func add(t testing.TB, w *cpio.Writer, name, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil {
		err = w.WriteHeader(&cpio.Header{Name: name, Mode: cpio.TypeReg | 0o755, Size: int64(len(b))})
	}
	if err == nil {
		_, err = w.Write(b)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Build makes a static program of a package: how is "build", or "test" for its
// tests.
func Build(t testing.TB, path, how, pkg string) {
	t.Helper()
	args := []string{"build", "-trimpath", "-ldflags=-s -w", "-o", path, pkg}
	if how == "test" {
		args = []string{"test", "-c", "-trimpath", "-ldflags=-s -w", "-o", path, pkg}
	}
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", pkg, err, out)
	}
}

func command(t testing.TB, path, name string, args ...string) {
	t.Helper()
	cmd := exec.Command("env", append([]string{"PATH=" + os.Getenv("PATH") + ":" + path, name}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}
