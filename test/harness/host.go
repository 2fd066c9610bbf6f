package harness

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Links counts the host's interfaces with an address in a prefix: where a
// server was given the prefix as its own, these are its sandboxes' links.
func Links(prefix string) (int, error) {
	p, err := netip.ParsePrefix(prefix)
	if err != nil {
		return 0, err
	}
	links, err := net.Interfaces()
	if err != nil {
		return 0, fmt.Errorf("list the host's interfaces: %w", err)
	}
	n := 0
	for _, l := range links {
		addrs, _ := l.Addrs() // one that is gone meanwhile has none
		for _, a := range addrs {
			if have, err := netip.ParsePrefix(a.String()); err == nil && p.Contains(have.Addr()) {
				n++
			}
		}
	}
	return n, nil
}

// Leftovers names what an ended server left on the host: processes, links,
// sockets, mounts below its directory, loop devices.
func Leftovers(dir, prefix string) ([]string, error) {
	var out []string
	for _, p := range ProcessesOf(dir) {
		out = append(out, fmt.Sprintf("process %d: %.200s", p.PID, strings.ReplaceAll(p.Cmdline, "\x00", " ")))
	}
	n, err := Links(prefix)
	if err != nil {
		return nil, err
	}
	if n > 0 {
		out = append(out, fmt.Sprintf("%d links in %s", n, prefix))
	}
	for _, table := range []string{"/proc/net/unix", "/proc/self/mountinfo"} {
		b, err := os.ReadFile(table)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, dir+"/") {
				out = append(out, table+": "+strings.TrimSpace(line))
			}
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, loop := range loops {
		if b, _ := os.ReadFile(loop); strings.Contains(string(b), dir) {
			out = append(out, loop+": "+strings.TrimSpace(string(b)))
		}
	}
	return out, nil
}

// SmallDisk mounts a file system of so many MiB below the development
// directory, for the state of a server whose disk is to be filled.
func SmallDisk(mib int) (dir string, release func() error, err error) {
	dir, err = os.MkdirTemp(DevDir(), "e-")
	if err != nil {
		return "", nil, err
	}
	if err := unix.Mount("wrenn-test", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=711", mib)); err != nil {
		os.Remove(dir)
		return "", nil, fmt.Errorf("mount a small file system: %w", err)
	}
	return dir, func() error {
		if err := unix.Unmount(dir, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return os.Remove(dir)
	}, nil
}

// Fill leaves so many bytes of dir's file system free and returns how to make
// room again.
func Fill(dir string, free uint64) (empty func() error, err error) {
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	empty = func() error { return os.Remove(ballast) }
	// What others write meanwhile takes room, too; then there is less to take.
	for try := range uint64(10) {
		if err = take(f, free+try*(256<<10)); err != unix.ENOSPC {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("fill the disk: %w", err), empty())
	}
	return empty, nil
}

// take has a file take the room of its file system, but for so many bytes.
func take(f *os.File, free uint64) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("ask for the room: %w", err)
	}
	have := st.Bavail * uint64(st.Bsize)
	if have <= free {
		return nil
	}
	return unix.Fallocate(int(f.Fd()), 0, 0, int64(have-free))
}
