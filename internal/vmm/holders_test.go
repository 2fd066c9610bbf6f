package vmm

import "testing"

func TestProcessesThatBecomeAVMMAreKnown(t *testing.T) {
	const dir = "/var/lib/wrenn/sandboxes/a"
	for cmdline, want := range map[string]bool{
		"/usr/bin/qemu-system-x86_64\x00-qmp\x00" + dir + "/qmp.sock":             true,
		"/usr/bin/jailer\x00--chroot-base-dir\x00" + dir + "/jail\x00":            true,
		"/usr/bin/firecracker\x00--api-sock\x00" + dir + "/vm/api.sock":           true,
		"/usr/bin/firecracker\x00--api-sock\x00" + dir + "b/vm/api.sock":          false,
		"/usr/bin/jailer\x00--chroot-base-dir\x00/var/lib/wrenn/sandboxes/b/jail": false,
		"/usr/bin/vi\x00" + dir + "/journal.json":                                 false,
	} {
		if got := isVMMOf(cmdline, dir); got != want {
			t.Errorf("%q: %v, want %v", cmdline, got, want)
		}
	}
}
