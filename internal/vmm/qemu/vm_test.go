package qemu

import (
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
)

// subject boots real machines; the patience is for a busy host.
func subject(t *testing.T, o Options) vmmtest.Subject {
	t.Helper()
	vmmtest.RequireQEMU(t)
	kernel, _ := vmmtest.Kernel(t)
	return vmmtest.Subject{
		Driver: New(o), Patience: 2 * time.Minute,
		Boot: vmm.BootArgs{
			Kernel: kernel, Initrd: vmmtest.Initrd(t), Spec: vmm.Spec{VCPUs: 1, MemoryMB: 128},
		},
	}
}

func TestVMConforms(t *testing.T) { vmmtest.Run(t, subject(t, Options{})) }
