// Command init is PID 1 of the nested machine. It mounts what tests expect of a
// host, loads the modules, moves into the disk's file system, runs the steps of
// /plan.json one after the other with their output on the second serial port,
// and turns the machine off.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// plan is written by package nested.
type plan struct {
	Steps []step
}

type step struct {
	Name string
	Args []string
	Env  []string
	Dir  string
}

func main() {
	if err := run(); err != nil {
		fmt.Println("nested init:", err)
	}
	// Without a sync: the disk is thrown away, and what a failed test left of a
	// block device would have it wait for ever.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	mount("devtmpfs", "/dev")
	mount("proc", "/proc")
	mount("sysfs", "/sys")
	loadModules()
	if err := enterDisk(); err != nil {
		return err
	}
	for _, dir := range []string{"/run", "/tmp", "/dev/shm"} {
		mount("tmpfs", dir)
	}
	mount("cgroup2", "/sys/fs/cgroup")
	_ = os.WriteFile("/proc/sys/vm/unprivileged_userfaultfd", []byte("0"), 0)
	showStacks()
	loopback()
	b, err := os.ReadFile("/plan.json")
	if err != nil {
		return err
	}
	var p plan
	if err := json.Unmarshal(b, &p); err != nil {
		return fmt.Errorf("plan.json: %w", err)
	}
	out, err := os.OpenFile("/dev/ttyS1", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	if err := raw(out); err != nil {
		return err
	}
	for _, s := range p.Steps {
		began := time.Now()
		fmt.Fprintf(out, "=== STEP  %s\n", s.Name)
		cmd := exec.Command(s.Args[0], s.Args[1:]...)
		cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"}, s.Env...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = s.Dir, out, out
		err := cmd.Run()
		fmt.Fprintf(out, "\n--- STEP  %s %.1fs %v\n", s.Name, time.Since(began).Seconds(), verdict(err))
	}
	return nil
}

func verdict(err error) string {
	if err == nil {
		return "ok"
	}
	return err.Error()
}

func mount(kind, dir string) {
	_ = os.MkdirAll(dir, 0o755)
	if err := unix.Mount(kind, dir, kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		fmt.Println("nested init: mount", dir, err)
	}
}

// loadModules loads /modules/*.ko in the order of their names.
func loadModules() {
	names, _ := filepath.Glob("/modules/*.ko")
	for _, name := range names { // Glob sorts
		f, err := os.Open(name)
		if err != nil {
			fmt.Println("nested init: module", name, err)
			continue
		}
		options := ""
		if strings.HasSuffix(name, "-nbd.ko") {
			options = "nbds_max=4"
		}
		if err := unix.FinitModule(int(f.Fd()), options, 0); err != nil {
			fmt.Println("nested init: module", name, err)
		}
		f.Close()
	}
}

// showStacks makes the kernel tell on its console where a task hangs, not only
// that it does.
func showStacks() {
	_ = os.WriteFile("/proc/sys/kernel/printk", []byte("7"), 0)
	_ = os.WriteFile("/proc/sys/kernel/hung_task_warnings", []byte("4"), 0)
	_ = os.WriteFile("/proc/sys/kernel/hung_task_all_cpu_backtrace", []byte("1"), 0)
}

// enterDisk makes the disk the root, as an initramfs does: jailer's pivot_root
// cannot leave the initramfs itself.
func enterDisk() error {
	var err error
	for range 500 {
		if err = unix.Mount("/dev/vda", "/root", "ext4", 0, ""); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond) // the device comes when it comes
	}
	if err != nil {
		return fmt.Errorf("mount the disk: %w", err)
	}
	for _, dir := range []string{"/dev", "/proc", "/sys"} {
		_ = os.MkdirAll("/root"+dir, 0o755)
		if err := unix.Mount(dir, "/root"+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("make the disk the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

func loopback() {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if ifr, err := unix.NewIfreq("lo"); err == nil {
		ifr.SetUint16(unix.IFF_UP)
		_ = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
	}
}

// raw keeps the terminal from changing what goes through.
func raw(f *os.File) error {
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return err
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON
	t.Cflag = t.Cflag&^unix.CBAUD | unix.B115200
	return unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}
