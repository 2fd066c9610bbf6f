//go:build linux

package uffd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Peer is a VMM that has memory of its own and is expected to hand its
// userfaultfd over on a unix socket, as Firecracker does. The VMM is not
// trusted: what it says decides about nothing but its own memory.
type Peer struct {
	proc *process
}

// handoverLimit bounds the time from a connection to the end of its message.
const handoverLimit = 30 * time.Second

// OpenPeer takes hold of the process that will hand its userfaultfd over.
// ErrGone: there is none.
func OpenPeer(pid int) (*Peer, error) {
	proc, err := openProcess(pid)
	if err != nil {
		return nil, fmt.Errorf("uffd: expect a hand-over: %w", err)
	}
	return &Peer{proc}, nil
}

// PID of the process.
func (p *Peer) PID() int { return p.proc.pid }

// StartTime of the process, clock ticks after boot.
func (p *Peer) StartTime() uint64 { return p.proc.start }

// Kill ends the process.
func (p *Peer) Kill() error { return p.proc.kill() }

// HasUserfaultfd tells whether the process has made a userfaultfd already.
func (p *Peer) HasUserfaultfd() (bool, error) {
	fds, err := userfaultfds(p.proc.pid)
	return len(fds) > 0, err
}

// Close lets go of the process. After an Accept that succeeded it does nothing.
func (p *Peer) Close() {
	if p.proc != nil {
		p.proc.close()
		p.proc = nil
	}
}

// Accept waits on l until the process has connected and handed its userfaultfd
// over for the image src, whose removed pages m takes, empty at first.
// Connections of other processes are closed and told to refused, which may be
// nil. On success the Peer and m belong to the Attachment. Another error than
// ctx's is final: the process sent something that cannot be served, and its
// faults will never be; it should be killed.
func (p *Peer) Accept(ctx context.Context, l *net.UnixListener, src Source, m *PageMap, refused func(error)) (*Attachment, error) {
	stop := context.AfterFunc(ctx, func() { l.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		conn, err := l.AcceptUnix()
		if cerr := ctx.Err(); cerr != nil {
			if err == nil {
				conn.Close()
			}
			return nil, cerr
		}
		if err != nil {
			return nil, fmt.Errorf("uffd: wait for a hand-over: %w", err)
		}
		a, err := p.receive(ctx, conn, src, m)
		conn.Close()
		if err == nil {
			p.proc = nil
			return a, nil
		}
		if cerr := ctx.Err(); cerr != nil {
			return nil, cerr
		}
		if !errors.Is(err, errStranger) {
			return nil, fmt.Errorf("uffd: hand-over by process %d: %w", p.proc.pid, err)
		}
		if refused != nil {
			refused(err)
		}
	}
}

var errStranger = errors.New("not the process expected")

func (p *Peer) receive(ctx context.Context, conn *net.UnixConn, src Source, m *PageMap) (*Attachment, error) {
	if err := p.checkCredentials(conn); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := conn.SetReadDeadline(time.Now().Add(handoverLimit)); err != nil {
		return nil, fmt.Errorf("limit the time: %w", err)
	}
	b, fd, err := readHandover(conn)
	if err != nil {
		return nil, err
	}
	regions, err := ParseRegions(b, src.Size())
	if err == nil {
		err = checkUserfaultfd(fd)
	}
	remote := -1
	if err == nil {
		remote, err = p.remoteFD(fd)
	}
	if err == nil {
		// The VMM's flags are ours, too: the same open file.
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	rec := AttachmentRecord{PID: p.proc.pid, StartTime: p.proc.start, RemoteFD: remote, Length: src.Size(), Regions: regions}
	return &Attachment{rec: rec, src: src, regions: regions, pages: m, proc: p.proc, fd: fd}, nil
}

func (p *Peer) checkCredentials(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	switch {
	case cerr != nil:
		return fmt.Errorf("credentials of the peer: %w", cerr)
	case int(cred.Pid) != p.proc.pid:
		return fmt.Errorf("process %d connected, %d is expected: %w", cred.Pid, p.proc.pid, errStranger)
	case p.proc.exited():
		return fmt.Errorf("process %d: %w", p.proc.pid, ErrGone)
	}
	return nil
}

// readHandover reads one JSON value and the one descriptor that comes with it.
func readHandover(conn *net.UnixConn) (body []byte, fd int, err error) {
	fd = -1
	defer func() {
		if err != nil && fd >= 0 {
			unix.Close(fd)
			fd = -1
		}
	}()
	buf := make([]byte, maxHandoverBytes+1)
	oob := make([]byte, unix.CmsgSpace(4*8))
	n := 0
	for range maxHandoverParts {
		got, oobn, flags, _, rerr := conn.ReadMsgUnix(buf[n:], oob)
		fds, ferr := descriptors(oob[:oobn])
		if flags&unix.MSG_CTRUNC != 0 {
			ferr = errors.Join(ferr, errors.New("control message is cut off"))
		}
		for _, f := range fds {
			if fd < 0 {
				fd = f
				continue
			}
			unix.Close(f)
			ferr = errors.Join(ferr, errors.New("more than one descriptor"))
		}
		n += got
		switch {
		case ferr != nil:
			return nil, fd, fmt.Errorf("descriptors of the hand-over: %w", ferr)
		case rerr != nil:
			return nil, fd, fmt.Errorf("read the hand-over, %d bytes so far: %w", n, rerr)
		case n > maxHandoverBytes:
			return nil, fd, fmt.Errorf("hand-over has more than %d bytes", maxHandoverBytes)
		}
		// A list that is whole ends with a bracket; most come in one part.
		if t := bytes.TrimSpace(buf[:n]); got == 0 || bytes.HasSuffix(t, []byte("]")) && json.Valid(t) {
			if fd < 0 {
				return nil, fd, fmt.Errorf("hand-over of %d bytes without a descriptor", n)
			}
			return buf[:n], fd, nil
		}
	}
	return nil, fd, fmt.Errorf("hand-over in more than %d parts", maxHandoverParts)
}

// descriptors gives all descriptors in control messages; they are open and
// the caller's, also beside an error.
func descriptors(oob []byte) (fds []int, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		f, ferr := unix.ParseUnixRights(&msgs[i])
		fds, err = append(fds, f...), errors.Join(err, ferr)
	}
	return fds, err
}

const userfaultfdLink = "anon_inode:[userfaultfd]"

func checkUserfaultfd(fd int) error {
	link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err == nil && link != userfaultfdLink {
		err = fmt.Errorf("descriptor is %s, not a userfaultfd", link)
	}
	return err
}

// userfaultfds lists the numbers of a process's userfaultfds.
func userfaultfds(pid int) ([]int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list descriptors of process %d: %w", pid, err)
	}
	var fds []int
	for _, e := range entries {
		link, err := os.Readlink(dir + "/" + e.Name())
		if err != nil || link != userfaultfdLink {
			continue
		}
		if n, err := strconv.Atoi(e.Name()); err == nil {
			fds = append(fds, n)
		}
	}
	return fds, nil
}

// remoteFD finds the VMM's own descriptor of the userfaultfd. Without one our
// death would be the end of it, and the guest would read zeros.
func (p *Peer) remoteFD(fd int) (int, error) {
	fds, err := userfaultfds(p.proc.pid)
	if err != nil {
		return -1, err
	}
	const kcmpFile = 0
	for _, n := range fds {
		r, _, e := unix.Syscall6(unix.SYS_KCMP, uintptr(os.Getpid()), uintptr(p.proc.pid), kcmpFile, uintptr(fd), uintptr(n), 0)
		if e == 0 && r == 0 {
			return n, nil
		}
		if e == unix.ENOSYS && len(fds) == 1 {
			return n, nil // which else
		}
	}
	return -1, fmt.Errorf("process %d keeps no descriptor of its userfaultfd (of %d that it has)", p.proc.pid, len(fds))
}

// ReattachCopy takes over an attachment in copy mode whose server is gone. m
// is the map that the server before this one kept, and belongs to the
// Attachment on success. Faults that had been read but not answered are raised
// again, removals that had been read but not noted are noted. ErrGone: the
// process has ended.
func ReattachCopy(ctx context.Context, rec AttachmentRecord, src Source, m *PageMap) (*Attachment, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := rec.validate(src.Size()); err != nil {
		return nil, fmt.Errorf("uffd: %w", err)
	}
	regions, err := checkRegions(rec.Regions, src.Size())
	if err != nil {
		return nil, fmt.Errorf("uffd: attachment record: %w", err)
	}
	proc, err := openProcess(rec.PID)
	if err != nil {
		return nil, fmt.Errorf("uffd: attach again to process %d: %w", rec.PID, err)
	}
	a := &Attachment{rec: rec, src: src, regions: regions, pages: m, proc: proc, fd: -1}
	if proc.start != rec.StartTime {
		err = fmt.Errorf("another process has its number now: %w", ErrGone)
	}
	if err == nil {
		a.fd, err = fetchUserfaultfd(proc, rec.RemoteFD)
	}
	if err == nil {
		a.replay()
		err = a.wakeAll()
	}
	if err != nil {
		if a.fd >= 0 {
			unix.Close(a.fd)
		}
		proc.close()
		return nil, fmt.Errorf("uffd: attach again to process %d: %w", rec.PID, err)
	}
	return a, nil
}

// fetchUserfaultfd duplicates a process's descriptor of a userfaultfd.
func fetchUserfaultfd(proc *process, remote int) (int, error) {
	fd, err := unix.PidfdGetfd(proc.pidfd, remote, 0)
	if err != nil {
		return -1, fmt.Errorf("get descriptor %d: %w", remote, err)
	}
	if err := checkUserfaultfd(fd); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
