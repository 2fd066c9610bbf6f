//go:build linux

package uffd

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// vma is a line of /proc/<pid>/maps.
type vma struct {
	start, end uintptr
	perms      string
	offset     int64
	dev, inode uint64
	path       string
}

func (v vma) length() int64 { return int64(v.end - v.start) }

// parseVMA parses "start-end perms offset major:minor inode path".
func parseVMA(line string) (vma, error) {
	bad := func(what string) (vma, error) {
		return vma{}, fmt.Errorf("maps line %.80q: %s", line, what)
	}
	f := strings.Fields(line)
	if len(f) < 5 {
		return bad("fewer than five fields")
	}
	lo, hi, ok := strings.Cut(f[0], "-")
	start, err1 := strconv.ParseUint(lo, 16, 64)
	end, err2 := strconv.ParseUint(hi, 16, 64)
	if !ok || err1 != nil || err2 != nil || end <= start {
		return bad("addresses")
	}
	offset, err := strconv.ParseInt(f[2], 16, 64)
	if err != nil {
		return bad("offset")
	}
	major, minor, ok := strings.Cut(f[3], ":")
	maj, err1 := strconv.ParseUint(major, 16, 32)
	mnr, err2 := strconv.ParseUint(minor, 16, 32)
	if !ok || err1 != nil || err2 != nil {
		return bad("device")
	}
	inode, err := strconv.ParseUint(f[4], 10, 64)
	if err != nil {
		return bad("inode")
	}
	v := vma{start: uintptr(start), end: uintptr(end), perms: f[1], offset: offset, dev: unix.Mkdev(uint32(maj), uint32(mnr)), inode: inode}
	if len(f) > 5 {
		v.path = strings.Join(f[5:], " ")
	}
	return v, nil
}

// readMaps calls yield for each mapping of a process.
func readMaps(pid int, yield func(vma)) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	sc.Buffer(make([]byte, 0, 16<<10), 1<<20)
	for sc.Scan() {
		v, err := parseVMA(sc.Text())
		if err != nil {
			return err
		}
		yield(v)
	}
	return sc.Err()
}

// findMapping gives the one whole mapping of file in a process, whose perms
// must be as given. The kernel may show it in several pieces.
func findMapping(pid int, file *os.File, size int64, perms string) (uintptr, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return 0, fmt.Errorf("stat memfd: %w", err)
	}
	var pieces []vma
	err := readMaps(pid, func(v vma) {
		if v.inode == st.Ino && v.dev == st.Dev {
			pieces = append(pieces, v)
		}
	})
	if err != nil {
		return 0, fmt.Errorf("read mappings of process %d: %w", pid, err)
	}
	if len(pieces) == 0 {
		return 0, fmt.Errorf("process %d does not map the shared image", pid)
	}
	at := pieces[0].start
	var total int64
	for _, v := range pieces {
		if v.perms != perms {
			return 0, fmt.Errorf("process %d maps the shared image %q at %#x, %q expected", pid, v.perms, v.start, perms)
		}
		if v.offset != total || v.start != at+uintptr(total) {
			return 0, fmt.Errorf("process %d maps the shared image in more than one range", pid)
		}
		total += v.length()
	}
	if total != size {
		return 0, fmt.Errorf("process %d maps %d bytes of the shared image of %d", pid, total, size)
	}
	return at, nil
}

// findFD gives the number of a descriptor of file in a process.
func findFD(pid int, file *os.File) (int, error) {
	var want unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &want); err != nil {
		return -1, fmt.Errorf("stat memfd: %w", err)
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return -1, fmt.Errorf("list descriptors of process %d: %w", pid, err)
	}
	for _, e := range entries {
		var st unix.Stat_t
		if err := unix.Stat(dir+"/"+e.Name(), &st); err != nil {
			continue // closed meanwhile, or nothing with a path
		}
		if st.Ino == want.Ino && st.Dev == want.Dev {
			return strconv.Atoi(e.Name())
		}
	}
	return -1, fmt.Errorf("process %d has no descriptor of the shared image", pid)
}

// threads lists the threads of a process, the main one first.
func threads(pid int) ([]int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, fmt.Errorf("list threads of process %d: %w", pid, err)
	}
	tids := []int{pid}
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil && tid != pid {
			tids = append(tids, tid)
		}
	}
	return tids, nil
}

// startTime is when a process started, in clock ticks after boot: with the
// pid it names a process for good.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return 0, fmt.Errorf("process %d: %w", pid, ErrGone)
		}
		return 0, err
	}
	// The name, in parentheses, may hold anything.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields after the name", pid, len(f))
	}
	return strconv.ParseUint(f[19], 10, 64)
}

// process is a hold on one process that a reused pid cannot betray.
type process struct {
	pid   int
	start uint64
	pidfd int
}

func openProcess(pid int) (*process, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("pid %d", pid)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("open pidfd of %d: %w", pid, err)
	}
	p := &process{pid: pid, pidfd: fd}
	if p.start, err = startTime(pid); err == nil && p.exited() {
		err = fmt.Errorf("process %d: %w", pid, ErrGone) // the start time may be a successor's
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *process) close() { unix.Close(p.pidfd) }

func (p *process) exited() bool {
	fds := [1]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds[:], 0)
	return err == nil && n == 1
}

func (p *process) kill() error {
	err := unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0)
	if err == unix.ESRCH {
		return nil
	}
	return err
}

// Memory reads the memory of a process.
type Memory struct {
	f    *os.File
	base uintptr
}

// ReadMemory opens the memory of process pid; offset 0 of the result is addr.
// Pages that are not there yet are faulted in and so are served first; a read
// blocks until then.
func ReadMemory(pid int, addr uintptr) (*Memory, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, fmt.Errorf("uffd: open memory of process %d: %w", pid, err)
	}
	return &Memory{f: f, base: addr}, nil
}

var _ io.ReaderAt = (*Memory)(nil)

// ReadAt reads guest memory at off bytes after the base address.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > int64(^uintptr(0)>>1)-int64(m.base) {
		return 0, fmt.Errorf("uffd: read memory at offset %d", off)
	}
	n, err := m.f.ReadAt(p, int64(m.base)+off)
	if err != nil {
		return n, fmt.Errorf("uffd: read %d bytes of guest memory at %d: %w", len(p), off, err)
	}
	return n, nil
}

// Close releases the process's memory.
func (m *Memory) Close() error { return m.f.Close() }
