package qemu

import (
	"bytes"
	"debug/elf"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func TestReason(t *testing.T) {
	const panicked = "Kernel panic - not syncing: sysrq triggered crash"
	for _, c := range []struct {
		killed            bool
		shutdown, console string
		want              vmm.Reason
	}{
		{true, "guest-reset", panicked, vmm.ReasonKilled},
		{false, "guest-reset", panicked, vmm.ReasonPanic},
		{false, "guest-reset", "", vmm.ReasonReset},
		{false, "guest-shutdown", "", vmm.ReasonShutdown},
		{false, "guest-panic", "", vmm.ReasonPanic},
		{false, "host-signal", panicked, vmm.ReasonProcess},
		{false, "", panicked, vmm.ReasonProcess},
	} {
		if got := reason(c.killed, c.shutdown, c.console); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

// TestCommandLine: numbers of descriptors are what the Record says, and a path
// cannot smuggle in an option.
func TestCommandLine(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := vmm.HostArgs{ID: "a", Dir: "/d", Memory: f, Tap: f, UffdDev: f, DiskSocket: "/d/n,read-only=on"}
	l := newLaunch(Options{}, vmm.Info{Accel: vmm.AccelTCG, CPUModel: cpuTCG, TSCKHz: 7}, "/q", h, vmm.Spec{VCPUs: 2, MemoryMB: 64, MAC: "02:77:72:00:00:02"})
	if l.tapFD != 6 || l.uffdFD != 7 {
		t.Errorf("tap is %d, uffd %d", l.tapFD, l.uffdFD)
	}
	all := strings.Join(l.args, " ")
	for _, want := range []string{"mem-path=/proc/self/fd/3,size=64M,share=on", "server.path=/d/n,,read-only=on,", "tap,id=net0,fd=6", "-sandbox on"} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is missing in %s", want, all)
		}
	}
	h.Tap = nil
	if l = newLaunch(Options{NoSandbox: true}, vmm.Info{}, "/q", h, vmm.Spec{}); l.uffdFD != 6 || l.tapFD != -1 || slices.Contains(l.args, "-sandbox") {
		t.Errorf("without tap and sandbox: %+v", l)
	}
	if got := cmdline(vmm.Info{Accel: vmm.AccelTCG, TSCKHz: 7}); !strings.Contains(got, "tsc_early_khz=7 ") {
		t.Errorf("kernel command line %q", got)
	}
	if got := cmdline(vmm.Info{Accel: vmm.AccelKVM}); strings.Contains(got, "mitigations=off") {
		t.Error("mitigations are off on real hardware")
	}
}

func TestProbeInitrd(t *testing.T) {
	r := cpio.NewReader(bytes.NewReader(vmm.ProbeInitrd()))
	h, err := r.Next()
	if err != nil || h.Name != "init" || h.Mode.Perm() != 0o755 {
		t.Fatalf("%+v, %v", h, err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if f.Entry != 0x400078 || len(f.Progs) != 1 || f.Progs[0].Filesz != uint64(len(b)) {
		t.Errorf("%+v", f.FileHeader)
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("after init: %v", err)
	}
}

// script makes a program that stands for QEMU.
func script(t *testing.T, body string) string {
	p := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(p, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestProbeBadBinary(t *testing.T) {
	for name, c := range map[string]struct{ binary, want string }{
		"missing":   {"/nonexistent/qemu", "not installed"},
		"too old":   {script(t, "echo QEMU emulator version 6.2.0"), "too old"},
		"no answer": {script(t, "echo hello"), "says none"},
		"fails":     {script(t, "echo broken >&2; exit 3"), "broken"},
	} {
		if _, err := New(Options{Binary: c.binary}).Probe(limited(t, time.Minute)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestProbeCache: a verdict counts for its key alone.
func TestProbeCache(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skip("skipped: this host has no /dev/kvm, so no verdict is looked up")
	}
	dir := t.TempDir()
	kernel, cache := filepath.Join(dir, "kernel"), filepath.Join(dir, "kvm.json")
	if err := os.WriteFile(kernel, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	o := Options{Binary: script(t, `case "$1" in -version) echo QEMU emulator version 7.2.0;; *) echo no such machine >&2; exit 1;; esac`),
		ProbeKernel: kernel, ProbeCache: cache}
	info, err := New(o).Probe(limited(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if info.Accel != vmm.AccelTCG || len(info.Remarks) != 1 || !strings.Contains(info.Remarks[0], "no such machine") {
		t.Fatalf("a QEMU that does not boot: %+v", info)
	}
	key, err := New(o).probeKey(info)
	if err != nil {
		t.Fatal(err)
	}
	v, ok := vmm.LoadVerdict(cache, key)
	if !ok || v.Works {
		t.Fatalf("the verdict was not kept: %+v", v)
	}
	// A verdict in the cache is believed.
	v.Works, v.Finding = true, "seen it"
	if err := vmm.SaveVerdict(cache, v); err != nil {
		t.Fatal(err)
	}
	if info, err = New(o).Probe(limited(t, time.Minute)); err != nil || info.Accel != vmm.AccelKVM || info.CPUFlagsDigest == "" {
		t.Errorf("with a cached verdict: %+v, %v", info, err)
	}
	// Another kernel asks anew.
	if err := os.WriteFile(kernel, []byte("two"), 0o600); err != nil {
		t.Fatal(err)
	}
	if info, err = New(o).Probe(limited(t, time.Minute)); err != nil || info.Accel != vmm.AccelTCG {
		t.Errorf("with another kernel: %+v, %v", info, err)
	}
	// KVM that was asked for and does not work is an error.
	o.Accel = AccelKVM
	if _, err := New(o).Probe(limited(t, time.Minute)); err == nil || !strings.Contains(err.Error(), "KVM was asked for") {
		t.Errorf("-accel kvm: %v", err)
	}
}
