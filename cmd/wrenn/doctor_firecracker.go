package main

import (
	"context"
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/kernelnbd"
	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker"
)

// checkFirecracker tells what Firecracker would need. Nothing of it is bad:
// without Firecracker there is QEMU.
func checkFirecracker(ctx context.Context, dir string) []finding {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	out := []finding{checkFirecrackerPrograms(ctx)}
	nbd := finding{nbdDevices, "ok", "the kernel's NBD client answers", ""}
	if d, err := kernelnbd.Open("", slog.New(slog.NewTextHandler(io.Discard, nil))); err != nil {
		nbd = finding{nbdDevices, "note", err.Error(), "modprobe nbd, and nbd in /etc/modules-load.d, for Firecracker; QEMU does without"}
	} else {
		d.Close()
	}
	out = append(out, nbd)
	if out[0].Status != "ok" {
		return out // there is nothing to boot with
	}
	return append(out, checkFirecrackerKVM(ctx, dir))
}

func checkFirecrackerPrograms(ctx context.Context) finding {
	binary, jailer, version, err := firecracker.Find(ctx, firecracker.Options{})
	if err != nil {
		return finding{"firecracker", "note", err.Error(), "put firecracker and jailer of one release into the PATH, for --driver firecracker; QEMU does without"}
	}
	return finding{"firecracker", "ok", version + ": " + binary + ", " + jailer, ""}
}

func checkFirecrackerKVM(ctx context.Context, dir string) finding {
	const what = firecrackerKVM
	kernels, _ := filepath.Glob(filepath.Join(cacheDir(dir), "templates", "base", "*", "vmlinuz"))
	if len(kernels) == 0 {
		return finding{what, "note", "unknown: only a boot of the guest's kernel proves it, and there is no template yet", "wrenn template build"}
	}
	vmlinux, err := template.EnsureVmlinux(kernels[0])
	if err != nil {
		return finding{what, "note", err.Error(), "wrenn template build"}
	}
	info, err := firecracker.New(firecracker.Options{
		ProbeKernel: vmlinux, ProbeCache: firecrackerVerdict(dir), UID: defaultVMMUser, GID: defaultVMMUser,
	}).Probe(ctx)
	if err != nil {
		return finding{what, "note", err.Error(), "sandboxes run on QEMU; Firecracker needs a host whose KVM boots the guest's kernel"}
	}
	found := info.CPUModel
	if len(info.Remarks) > 0 {
		found = info.Remarks[0] + ", " + found
	}
	return finding{what, "ok", found, ""}
}
