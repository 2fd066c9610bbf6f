package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	rpc "connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/pager"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/qemu"
)

// finding is one line of the doctor's report.
type finding struct {
	Check string `json:"check"`
	// Status is ok, note (works, but less well) or bad (sandboxes cannot run).
	Status string `json:"status"`
	Found  string `json:"found"`
	Remedy string `json:"remedy,omitempty"`
}

const doctorLong = `Tell what this host can and cannot do for sandboxes, and what to do about it.

Nothing is changed but the remembered verdict on KVM, which a real boot of the
guest's kernel has to prove. Exit code 1 when sandboxes cannot run here.

--bundle writes what a report of a fault needs into a tar.gz: versions, these
findings, flags, journals, manifests, ends of logs, metrics. It holds no keys,
tokens, environments or metadata of sandboxes.`

func newDoctorCmd() *cobra.Command {
	var dir, bundle string
	cmd := &cobra.Command{
		Use: "doctor", Short: "Tell what this host can do, and the remedy", Long: doctorLong,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings := examine(cmd.Context(), dir)
			o := outputOf(cmd)
			if o.json {
				if err := o.printJSON(map[string]any{"findings": findings}); err != nil {
					return err
				}
			} else if err := printFindings(o, findings); err != nil {
				return err
			}
			if bundle != "" {
				if err := writeBundle(cmd.Context(), bundle, dir, serverURL(), findings); err != nil {
					return err
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "wrote %s; look into it before you send it\n", bundle)
			}
			for _, f := range findings {
				if f.Status == "bad" {
					return fmt.Errorf("sandboxes cannot run on this host as it is: %s", f.Found)
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", stateDir(), "state directory")
	cmd.Flags().StringVar(&bundle, "bundle", "", "also write a tar.gz for a report of a fault, without secrets, to this new file")
	addOutputFlags(cmd)
	return cmd
}

func printFindings(o output, findings []finding) error {
	var rows [][]string
	for _, f := range findings {
		rows = append(rows, []string{f.Status, f.Check, f.Found})
		if f.Remedy != "" {
			rows = append(rows, []string{"", "", "→ " + f.Remedy})
		}
	}
	return o.table([]string{"", "CHECK", "FOUND"}, rows)
}

func examine(ctx context.Context, dir string) []finding {
	out := []finding{checkRoot(), checkProgram(qemuProgram, "qemu-system-x86", "bad"),
		checkProgram("mmdebstrap", "mmdebstrap", "note"), checkProgram("mke2fs", "e2fsprogs", "note")}
	out = append(out, checkAccelerator(ctx, dir), checkUserfaultfd(), checkDevice("/dev/net/tun", "tap devices", "modprobe tun; in a container pass --device /dev/net/tun"))
	out = append(out, checkFirecracker(ctx, dir)...)
	excuseQEMU(out)
	out = append(out, checkNamespace(), checkMemory(), checkDisk(dir))
	return append(out, checkWaits(ctx, pager.Dial(pagerSocket(dir)))...)
}

// excuseQEMU: where Firecracker runs VMs, QEMU is not needed.
func excuseQEMU(all []finding) {
	for _, f := range all {
		if f.Check == firecrackerKVM && f.Status != "ok" || f.Check == nbdDevices && f.Status != "ok" {
			return
		}
	}
	if !slices.ContainsFunc(all, func(f finding) bool { return f.Check == firecrackerKVM }) {
		return
	}
	for i := range all {
		if f := &all[i]; f.Status == "bad" && (f.Check == qemuProgram || f.Check == acceleration) {
			f.Status = "note"
			f.Found += "; VMs run by Firecracker"
		}
	}
}

// Checks that others depend on.
const (
	qemuProgram    = "qemu-system-x86_64"
	acceleration   = "acceleration"
	firecrackerKVM = "firecracker on KVM"
	nbdDevices     = "block devices (nbd)"
)

func checkRoot() finding {
	if os.Geteuid() == 0 {
		return finding{"user", "ok", "root", ""}
	}
	return finding{"user", "bad", "not root", "run wrenn up as root; the other commands need no privilege"}
}

func checkProgram(name, pkg, severity string) finding {
	path, err := lookPath(name)
	if err != nil {
		return finding{name, severity, "not found", "apt-get install " + pkg}
	}
	out, err := exec.Command(path, "--version").Output() // mke2fs knows no such option
	if line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n"); err == nil && line != "" {
		return finding{name, "ok", line, ""}
	}
	return finding{name, "ok", path, ""}
}

// lookPath also finds what Debian puts where only root's PATH leads.
func lookPath(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return exec.LookPath(filepath.Join("/usr/sbin", name))
}

func checkAccelerator(ctx context.Context, dir string) finding {
	kernels, _ := filepath.Glob(filepath.Join(cacheDir(dir), "templates", "base", "*", "vmlinuz"))
	if len(kernels) == 0 {
		return finding{acceleration, "note", "unknown: only a boot of the guest's kernel proves KVM, and there is no template yet", "wrenn template build"}
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	info, err := qemu.New(qemu.Options{ProbeKernel: kernels[0], ProbeCache: kvmVerdict(dir)}).Probe(ctx)
	if err != nil {
		return finding{acceleration, "bad", err.Error(), ""}
	}
	found := info.Accel
	if len(info.Remarks) > 0 {
		found += ": " + strings.Join(info.Remarks, "; ")
	}
	if info.Accel == "kvm" {
		return finding{acceleration, "ok", found, ""}
	}
	return finding{acceleration, "note", found, "sandboxes run by emulation, several times slower; a host with KVM that boots the guest's kernel would be faster"}
}

func checkUserfaultfd() finding {
	if f, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR, 0); err == nil {
		f.Close()
		return finding{"userfaultfd", "ok", "/dev/userfaultfd", ""}
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return finding{"userfaultfd", "bad", errno.Error(), "needs a kernel with CONFIG_USERFAULTFD; in a container, allow the system call in its seccomp profile"}
	}
	unix.Close(int(fd))
	return finding{"userfaultfd", "ok", "system call", ""}
}

func checkDevice(path, what, remedy string) finding {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return finding{what, "bad", err.Error(), remedy}
	}
	f.Close()
	return finding{what, "ok", path, ""}
}

func checkNamespace() finding {
	cmd := exec.Command("/proc/self/exe", "version")
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Run(); err != nil {
		return finding{"network namespaces", "bad", err.Error(), "run as root; a container needs CAP_NET_ADMIN and CAP_SYS_ADMIN"}
	}
	return finding{"network namespaces", "ok", "can be made", ""}
}

func checkMemory() finding {
	mb := hostMemoryMB()
	f := finding{"memory", "ok", fmt.Sprintf("%d MiB", mb), ""}
	if mb < 2048 {
		f.Status, f.Remedy = "note", "there is room for few sandboxes of 512 MiB"
	}
	return f
}

// checkWaits tells which sandboxes of a running server stand still for want of
// room on the disk.
func checkWaits(ctx context.Context, client pager.Client) []finding {
	ctx, cancel := context.WithTimeout(ctx, pagerScrapeLimit)
	defer cancel()
	r, err := client.GetStatus(ctx, rpc.NewRequest(&pagerv1.GetStatusRequest{}))
	if err != nil {
		return nil // no server runs here
	}
	if len(r.Msg.Waits) == 0 {
		return []finding{{"sandboxes' disks", "ok", "no sandbox waits for room", ""}}
	}
	var ids []string
	for _, w := range r.Msg.Waits {
		ids = append(ids, w.SandboxId)
	}
	slices.Sort(ids)
	return []finding{{"sandboxes' disks", "note", "the disk is full: writes wait for room in " + strings.Join(ids, ", "),
		"free some space: delete snapshots and sandboxes (wrenn store usage tells what takes it); they go on by themselves"}}
}

func checkDisk(dir string) finding {
	for path := dir; ; path = filepath.Dir(path) {
		var st unix.Statfs_t
		err := unix.Statfs(path, &st)
		if err != nil && path != "/" {
			continue
		}
		if err != nil {
			return finding{"disk", "bad", err.Error(), ""}
		}
		free := st.Bavail * uint64(st.Bsize) >> 20
		f := finding{"disk", "ok", fmt.Sprintf("%d MiB free for %s", free, dir), ""}
		if free < 8192 {
			f.Status, f.Remedy = "note", "the base template and a few snapshots take some GiB; free some space or choose another --dir"
		}
		return f
	}
}
