package firecracker

import (
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// subject boots real machines; the patience is for an emulated processor.
func subject(t *testing.T, o Options) vmmtest.Subject {
	t.Helper()
	vmmtest.RequireKVM(t)
	kernel := vmmtest.Vmlinux(t)
	return vmmtest.Subject{
		Driver: New(o), Patience: 2 * time.Minute,
		Boot: vmm.BootArgs{
			Kernel: kernel, Initrd: vmmtest.Initrd(t), Spec: vmm.Spec{VCPUs: 1, MemoryMB: 128},
			Cmdline: "mitigations=off",
		},
	}
}

func TestVMJailedConforms(t *testing.T) {
	vmmtest.Run(t, subject(t, Options{UID: 60777, GID: 60777}))
}

func TestVMDirectConforms(t *testing.T) {
	s := subject(t, Options{Direct: true})
	s.Brief = true
	vmmtest.Run(t, s)
}
