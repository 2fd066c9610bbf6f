package firecracker

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker/fctest"
)

func TestWithoutKVMTheProbeSaysSo(t *testing.T) {
	p := fctest.NewProgram(t)
	kernel := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(kernel, []byte("a kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := New(Options{Binary: p.Path, Direct: true, ProbeKernel: kernel})
	d.kvm = "/nonexistent/kvm"
	if _, err := d.Probe(t.Context()); !errors.Is(err, ErrNoKVM) || !strings.Contains(err.Error(), d.kvm) {
		t.Errorf("without the device: %v", err)
	}
	// The device is there, and the guest's kernel does not boot: it dies.
	d.kvm = os.DevNull
	p.Fail(t, "PUT /actions", fctest.Die)
	if _, err := d.Probe(t.Context()); !errors.Is(err, ErrNoKVM) || !strings.Contains(err.Error(), fctest.LastWords) {
		t.Errorf("with a device that boots nothing: %v", err)
	}
	if left := p.Living(t); len(left) != 0 {
		t.Errorf("processes %v are left", left)
	}
}

func TestUserfaultfdIsAskedForBeforeItIsNeeded(t *testing.T) {
	dir := t.TempDir()
	device, sysctl := filepath.Join(dir, "userfaultfd"), filepath.Join(dir, "sysctl")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const user = 60777
	if err := checkUserfaultfd(0, device, sysctl); err != nil {
		t.Errorf("root: %v", err)
	}
	for _, denied := range []string{"", "0\n"} {
		write(sysctl, denied)
		err := checkUserfaultfd(user, device, sysctl)
		if err == nil || !strings.Contains(err.Error(), "userfaultfd") || !strings.Contains(err.Error(), "--vmm-user 0") {
			t.Errorf("denied by %q: %v, want an error with a remedy", denied, err)
		}
	}
	write(sysctl, "1\n")
	if err := checkUserfaultfd(user, device, sysctl); err != nil {
		t.Errorf("allowed to everybody: %v", err)
	}
	write(sysctl, "0\n")
	write(device, "")
	if err := checkUserfaultfd(user, device, sysctl); err != nil {
		t.Errorf("with the device: %v", err)
	}
}
