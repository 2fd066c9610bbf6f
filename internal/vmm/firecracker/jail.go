package firecracker

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// jailName is the directory of the jail in HostArgs.Dir.
const jailName = "jail"

func jailRoot(dir, id string) string {
	return filepath.Join(dir, jailName, "firecracker", id, "root")
}

// checkMount: a jail holds the program and device nodes, and both must work
// where it lies.
func checkMount(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("asking for the file system of %s: %w", dir, err)
	}
	for flag, name := range map[int64]string{unix.ST_NODEV: "nodev", unix.ST_NOEXEC: "noexec"} {
		if st.Flags&flag != 0 {
			return fmt.Errorf("the file system of %s is mounted %s, and a jail there would not work: choose a state directory elsewhere, or mount it anew without %s", dir, name, name)
		}
	}
	return nil
}

// removeRoot removes what an ended machine left of its jail, or of its
// directory where it had none.
func (m *machine) removeRoot() {
	root, _ := m.root()
	if filepath.Base(root) == "root" {
		root = filepath.Dir(filepath.Dir(filepath.Dir(root)))
	}
	if err := os.RemoveAll(root); err != nil {
		m.log.Warn("the files of an ended machine remain", "dir", root, "err", err)
	}
}

// jailID is what jailer knows the machine by: the sandbox, or what a process
// that was started ahead was called before it got one.
func (m *machine) jailID() string {
	root, inside := m.root()
	if inside != "/" {
		return m.rec.ID
	}
	return filepath.Base(filepath.Dir(root))
}

const (
	cgroupFS     = "/sys/fs/cgroup"
	cgroupParent = "wrenn"
	// pidsMax: one thread for each vCPU and a handful more.
	pidsMax = 128
)

// jailArgs is jailer's command line.
func (l *launch) jailArgs() ([]string, error) {
	// jailer wants the program's name to say what it is, and copies it.
	if base := filepath.Base(l.host.binary); base != "firecracker" {
		return nil, fmt.Errorf("the program is named %q; jailer needs the name firecracker", base)
	}
	uid, gid := l.uid(), l.o.GID
	a := []string{
		l.host.jailer, "--id", l.args.ID, "--exec-file", l.host.binary,
		"--uid", itoa(uid), "--gid", itoa(gid),
		"--chroot-base-dir", filepath.Join(l.args.Dir, jailName),
		"--resource-limit", "no-file=1024",
	}
	if l.args.NetNS != "" {
		a = append(a, "--netns", l.args.NetNS)
	}
	if haveCgroup2() {
		a = append(a, "--cgroup-version", "2", "--parent-cgroup", cgroupParent,
			"--cgroup", fmt.Sprintf("pids.max=%d", pidsMax))
	}
	return a, nil
}

// haveCgroup2 tells whether cgroups of version 2 are there and can be made: in
// a container they often cannot.
func haveCgroup2() bool {
	b, err := os.ReadFile(filepath.Join(cgroupFS, "cgroup.controllers"))
	if err != nil || !strings.Contains(string(b), "pids") {
		return false
	}
	return os.MkdirAll(filepath.Join(cgroupFS, cgroupParent), 0o755) == nil
}

// removeCgroup removes an ended machine's cgroup.
func removeCgroup(id string) { _ = os.Remove(filepath.Join(cgroupFS, cgroupParent, id)) }

// sweepCgroups removes the cgroups of machines that ended while nobody looked;
// the kernel keeps those that are in use.
func sweepCgroups() {
	entries, _ := os.ReadDir(filepath.Join(cgroupFS, cgroupParent))
	for _, e := range entries {
		if e.IsDir() {
			removeCgroup(e.Name())
		}
	}
}

// node makes the disk's device node in the jail: the same path for every
// machine, another device behind each.
func (l *launch) node(device string) error {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return fmt.Errorf("disk_device: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Errorf("disk_device: %s is no block device", device)
	}
	dir := filepath.Join(l.root, driveDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making the disk's directory: %w", err)
	}
	path := filepath.Join(l.root, drivePath)
	if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(st.Rdev)); err != nil {
		return fmt.Errorf("making the disk's node in the jail: %w", err)
	}
	return l.own(path)
}
