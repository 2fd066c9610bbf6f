//go:build linux && amd64

package uffd

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

const victimEnv = "UFFD_TEST_VICTIM"

func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) != "" {
		victimMain()
		return
	}
	os.Exit(m.Run())
}

// testImage is a Source of pseudo-random pages and zeros whose content can be
// computed. Pages 5 and 6 of every 16 and all of [zeroFrom, zeroTo) are zero.
type testImage struct {
	size             int64
	zeroFrom, zeroTo int64 // bytes
	reads            atomic.Int64
	delay            time.Duration
	fail             func(off, n int64) error
}

func newTestImage(mib int64) *testImage {
	return &testImage{size: mib << 20, zeroFrom: mib << 20 / 4, zeroTo: mib << 20 / 2}
}

func (t *testImage) Size() int64 { return t.size }

func (t *testImage) zero(off int64) bool {
	p := off / pageSize % 16
	return p == 5 || p == 6 || off >= t.zeroFrom && off < t.zeroTo
}

func (t *testImage) Span(off int64) (format.Kind, int64) {
	if off >= t.size {
		return format.Absent, 0
	}
	z := t.zero(off)
	n := int64(pageSize)
	for off+n < t.size && t.zero(off+n) == z {
		n += pageSize
	}
	if z {
		return format.Zero, n
	}
	return format.Data, n
}

func (t *testImage) ReadAt(p []byte, off int64) (int, error) {
	t.reads.Add(1)
	if t.delay > 0 {
		time.Sleep(t.delay)
	}
	if t.fail != nil {
		if err := t.fail(off, int64(len(p))); err != nil {
			return 0, err
		}
	}
	t.fill(p, off)
	return len(p), nil
}

// fill writes the image's content at page-aligned off into p.
func (t *testImage) fill(p []byte, off int64) {
	for i := 0; i+8 <= len(p); i += 8 {
		o := off + int64(i)
		var v uint64
		if !t.zero(o &^ (pageSize - 1)) {
			v = (uint64(o)/8 + 1) * 0x9e3779b97f4a7c15
			v ^= v >> 29
		}
		binary.LittleEndian.PutUint64(p[i:], v)
	}
}

// content is the whole image with writes applied.
func (t *testImage) content() []byte {
	b := make([]byte, t.size)
	t.fill(b, 0)
	return b
}

type victimProc struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	done  chan struct{} // closed when it ended
}

type victimOptions struct {
	devFD bool // hand down /dev/userfaultfd as descriptor 4
	uid   uint32
}

func startVictim(t testing.TB, shared *Shared, o victimOptions) *victimProc {
	t.Helper()
	// The magic link, because another uid may not reach the path.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{victimEnv + "=1"}
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{shared.File()}
	if o.devFD {
		dev, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, dev)
	}
	if o.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: o.uid, Gid: o.uid}}
	}
	return runVictim(t, cmd)
}

// watch waits by pidfd and reaps afterwards: a wait for a child would be given
// the ptrace stops of this process's other threads.
func (v *victimProc) watch(fd int) {
	defer close(v.done)
	defer unix.Close(fd)
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if err != unix.EINTR {
			break
		}
	}
	v.cmd.Process.Wait()
}

func (v *victimProc) pid() int { return v.cmd.Process.Pid }

func (v *victimProc) send(cmd string) {
	v.t.Helper()
	if _, err := io.WriteString(v.stdin, cmd+"\n"); err != nil {
		v.t.Fatalf("send %s: %v", cmd, err)
	}
}

func (v *victimProc) answer() (string, error) {
	line, err := v.out.ReadString('\n')
	return strings.TrimSpace(line), err
}

// do sends a command and gives the answer, or fails the test after a minute.
func (v *victimProc) do(format string, args ...any) string {
	v.t.Helper()
	v.send(fmt.Sprintf(format, args...))
	timer := time.AfterFunc(time.Minute, func() { v.cmd.Process.Kill() })
	defer timer.Stop()
	s, err := v.answer()
	if err != nil {
		v.t.Fatalf("victim's answer to %s: %v", fmt.Sprintf(format, args...), err)
	}
	return s
}

func (v *victimProc) wantSum(want []byte) {
	v.t.Helper()
	if got := v.do("sum 0 %d", len(want)); got != fmt.Sprintf("%x", sha256.Sum256(want)) {
		v.t.Fatalf("victim sees other memory than it should")
	}
}

func (v *victimProc) wantDead() {
	v.t.Helper()
	select {
	case <-v.done:
	case <-time.After(time.Minute):
		v.t.Fatal("victim still lives")
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it attaches to a process by ptrace and makes a userfaultfd for kernel faults")
	}
}

var sharedNumber atomic.Int64

func newTestShared(t testing.TB, src Source) *Shared {
	t.Helper()
	s, err := NewShared(fmt.Sprintf("uffd-test-%d-%d", os.Getpid(), sharedNumber.Add(1)), src)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newTestServer(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func mustInject(t testing.TB, v *victimProc, s *Shared, devFD int) *Attachment {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	start := time.Now()
	a, err := Inject(ctx, v.pid(), s, devFD)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("attached in %v", time.Since(start))
	return a
}

func mustAdd(t testing.TB, s *Server, id string, a *Attachment) {
	t.Helper()
	if err := s.Add(id, a); err != nil {
		t.Fatal(err)
	}
}
