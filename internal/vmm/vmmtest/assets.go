// Package vmmtest tests drivers of package vmm: one conformance suite (Run)
// for all of them, a fake driver (Fake) that passes it and that the engine's
// unit tests break on purpose, and the guest that the real ones boot. Only
// tests import it.
package vmmtest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cavaliergopher/cpio"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/template"
)

// RequireQEMU skips the test where QEMU is not installed.
func RequireQEMU(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("skipped: this test boots virtual machines and qemu-system-x86_64 is not installed")
	}
	if testing.Short() {
		t.Skip("skipped: this test boots virtual machines and -short was given")
	}
}

// Modules that the guest's kernel needs for its devices, in this order.
var Modules = []string{"virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net"}

// assetsEnv names a directory that holds the guest ready made (vmlinux,
// initrd), where the machine that tests run on can neither download nor build.
const assetsEnv = "WRENN_TEST_ASSETS"

// RequireKVM skips the test unless it is told that KVM works: in the nested
// machine of test/nested, or by WRENN_TEST_KVM=1 on a host that has it.
func RequireKVM(t testing.TB) {
	t.Helper()
	if os.Getenv("WRENN_TEST_KVM") != "1" {
		t.Skip("skipped: this test needs KVM; test/nested runs it in a machine that has it, WRENN_TEST_KVM=1 on this one")
	}
	if _, err := exec.LookPath("firecracker"); err != nil {
		t.Fatalf("WRENN_TEST_KVM=1, but firecracker is not in the PATH: %v", err)
	}
}

// Vmlinux returns the path of the guest's kernel for Firecracker.
func Vmlinux(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv(assetsEnv); dir != "" {
		return filepath.Join(dir, "vmlinux")
	}
	bzImage, _ := Kernel(t)
	path, err := template.EnsureVmlinux(bzImage)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var kernelOnce = sync.OnceValues(fetchKernel)

// Kernel returns the path of Debian's cloud kernel and of its module
// directory, unpacked from the package into the test cache (WRENN_TEST_CACHE,
// or wrenn-test in the user's cache directory). The first call may download.
func Kernel(t testing.TB) (bzImage, modules string) {
	t.Helper()
	dir, err := kernelOnce()
	if err != nil {
		t.Fatalf("preparing the guest's kernel: %v", err)
	}
	return one(t, filepath.Join(dir, "boot", "vmlinuz-*")), one(t, filepath.Join(dir, "lib", "modules", "*"))
}

func one(t testing.TB, pattern string) string {
	t.Helper()
	m, _ := filepath.Glob(pattern)
	if len(m) != 1 {
		t.Fatalf("preparing the guest's kernel: %d files match %s", len(m), pattern)
	}
	return m[0]
}

func cacheDir() (string, error) {
	if dir := os.Getenv("WRENN_TEST_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "wrenn-test"), nil
}

func fetchKernel() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "kernel")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(cache, "kernel.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	// Test binaries of several packages run at once.
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	tmp, err := os.MkdirTemp(cache, "kernel-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	// The package without a version is empty and depends on the real one.
	out, err := command(tmp, "apt-cache", "depends", "linux-image-cloud-amd64")
	if err != nil {
		return "", err
	}
	name := ""
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "Depends:" && strings.HasPrefix(f[1], "linux-image-") {
			name = f[1]
		}
	}
	if name == "" {
		return "", fmt.Errorf("linux-image-cloud-amd64 depends on no kernel (run apt-get update?)")
	}
	if _, err := command(tmp, "apt-get", "download", name); err != nil {
		return "", err
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return "", fmt.Errorf("apt-get download %s left %d packages", name, len(debs))
	}
	tree := filepath.Join(tmp, "tree")
	if _, err := command(tmp, "dpkg", "-x", debs[0], tree); err != nil {
		return "", err
	}
	return dir, os.Rename(tree, dir)
}

func command(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return string(out), nil
}

// Initrd builds the guest's initial RAM disk in a temporary directory: the
// program of vmmtest/guest as /init, and Modules.
func Initrd(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv(assetsEnv); dir != "" {
		return filepath.Join(dir, "initrd")
	}
	_, modules := Kernel(t)
	dir := t.TempDir()
	prog := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", prog,
		"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the guest's init: %v\n%s", err, out)
	}
	path := filepath.Join(dir, "initrd")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := cpio.NewWriter(f)
	for _, d := range []string{"dev", "proc", "sys", "modules"} {
		if err := w.WriteHeader(&cpio.Header{Name: d, Mode: cpio.TypeDir | 0o755}); err != nil {
			t.Fatal(err)
		}
	}
	add(t, w, "init", prog)
	for i, m := range Modules {
		add(t, w, fmt.Sprintf("modules/%02d-%s.ko", i, m), findModule(t, modules, m+".ko"))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func add(t testing.TB, w *cpio.Writer, name, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WriteHeader(&cpio.Header{Name: name, Mode: cpio.TypeReg | 0o755, Size: int64(len(b))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
}

func findModule(t testing.TB, root, name string) string {
	t.Helper()
	found := ""
	err := filepath.WalkDir(root, func(p string, e os.DirEntry, err error) error {
		if err == nil && e.Name() == name {
			found = p
		}
		return err
	})
	if err != nil || found == "" {
		t.Fatalf("module %s: not found under %s (%v)", name, root, err)
	}
	return found
}
