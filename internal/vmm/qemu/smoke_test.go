package qemu

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

func TestSmoke(t *testing.T) {
	vmmtest.RequireQEMU(t)
	k, _ := vmmtest.Kernel(t)
	ird := vmmtest.Initrd(t)
	d := New(Options{ProbeKernel: k, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	ctx := context.Background()
	t0 := time.Now()
	lap := func(s string) { t.Logf("%-10s %v", s, time.Since(t0)); t0 = time.Now() }
	info, err := d.Probe(ctx)
	lap("probe")
	t.Logf("%+v %v", info, err)
	if err != nil {
		t.Fatal(err)
	}
	fd, _ := unix.MemfdCreate("x", unix.MFD_CLOEXEC)
	mem := os.NewFile(uintptr(fd), "mem")
	mem.Truncate(256 << 20)
	dir := t.TempDir()
	m, err := d.Boot(ctx, vmm.BootArgs{HostArgs: vmm.HostArgs{ID: "a", Dir: dir, Memory: mem}, Spec: vmm.Spec{VCPUs: 1, MemoryMB: 256}, Kernel: k, Initrd: ird})
	lap("boot")
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	lap("sleep")
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	lap("pause")
	st, _ := os.Create(dir + "/state")
	if err := m.SaveState(ctx, st); err != nil {
		t.Fatal(err)
	}
	lap("save")
	fi, _ := st.Stat()
	t.Log(fi.Size())
	if err := m.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	lap("kill")
	t.Log(m.Err())
	m2, err := d.Restore(ctx, vmm.RestoreArgs{HostArgs: vmm.HostArgs{ID: "a", Dir: dir, Memory: mem}, State: vmm.State{Spec: vmm.Spec{VCPUs: 1, MemoryMB: 256}, Info: info, File: dir + "/state"}})
	lap("restore")
	if err != nil {
		t.Fatal(err)
	}
	if err := m2.Continue(ctx); err != nil {
		t.Fatal(err)
	}
	lap("cont")
	time.Sleep(500 * time.Millisecond)
	if err := m2.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	t.Log(vmm.Tail(dir+"/console.log", 3000))
	b, _ := os.ReadFile(dir + "/qemu.log")
	t.Log(string(b))
}
