//go:build linux && amd64

package uffd

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

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

// --- the victim -----------------------------------------------------------

// victimMain maps descriptor 3 shared and obeys commands on standard input,
// one answer line each.
func victimMain() {
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(8) // a goroutine in a page fault keeps its processor
	var st unix.Stat_t
	if err := unix.Fstat(3, &st); err != nil {
		victimFail("fstat", err)
	}
	mem, err := unix.Mmap(3, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		victimFail("mmap", err)
	}
	v := &victim{mem: mem}
	fmt.Println("ready")
	sc := bufio.NewScanner(os.Stdin)
	for sc.Scan() {
		fmt.Println(v.do(strings.Fields(sc.Text())))
	}
}

func victimFail(what string, err error) {
	fmt.Println("failed", what, err)
	os.Exit(1)
}

type victim struct {
	mem     []byte
	results chan string
	pipes   [2][2]int
	word    uint32
	spin    atomic.Bool
	sink    atomic.Uint32
}

func (v *victim) do(f []string) string {
	num := func(i int) (n int) {
		if _, err := fmt.Sscan(f[i], &n); err != nil {
			victimFail("argument", err)
		}
		return n
	}
	switch f[0] {
	case "sum": // off n
		return fmt.Sprintf("%x", sha256.Sum256(v.mem[num(1):num(1)+num(2)]))
	case "peek": // off
		return fmt.Sprint(v.mem[num(1)])
	case "poke": // off value
		v.mem[num(1)] = byte(num(2))
		return "ok"
	case "touch": // threads: reads every page, each thread in its own order
		var wg sync.WaitGroup
		n := len(v.mem) / pageSize
		for t := range num(1) {
			wg.Go(func() {
				runtime.LockOSThread()
				for i := range n {
					p := (i*(2*t+1)*37 + t*n/7) % n
					if t%2 == 1 {
						p = n - 1 - p
					}
					v.sink.Add(uint32(v.mem[p*pageSize])) // a load the compiler keeps
				}
			})
		}
		wg.Wait()
		return "ok"
	case "pageout": // off n
		if err := unix.Madvise(v.mem[num(1):num(1)+num(2)], unix.MADV_PAGEOUT); err != nil {
			victimFail("pageout", err)
		}
		return "ok"
	case "ping":
		return "ok"
	case "block":
		return v.block()
	case "unblock":
		return v.unblock()
	}
	victimFail(f[0], errors.New("unknown command"))
	return ""
}

// block puts threads to sleep in different system calls and prints name=tid.
func (v *victim) block() string {
	for i := range v.pipes {
		if err := unix.Pipe2(v.pipes[i][:], unix.O_CLOEXEC); err != nil {
			victimFail("pipe", err)
		}
	}
	v.results = make(chan string, 8)
	tids := make(chan string)
	run := func(name string, f func() string) {
		go func() {
			runtime.LockOSThread()
			tids <- fmt.Sprintf("%s=%d", name, unix.Gettid())
			v.results <- name + "=" + f()
		}()
	}
	var all []string
	for _, b := range []struct {
		name string
		f    func() string
	}{
		{"futex", func() string {
			_, _, e := unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&v.word)), 0, 0, 0, 0, 0)
			return fmt.Sprint(int(e))
		}},
		{"ppoll", func() string {
			fds := []unix.PollFd{{Fd: int32(v.pipes[0][0]), Events: unix.POLLIN}}
			mask, limit := uint64(0), unix.Timespec{Sec: 20}
			n, _, e := unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), 1,
				uintptr(unsafe.Pointer(&limit)), uintptr(unsafe.Pointer(&mask)), 8, 0)
			return fmt.Sprint(n, " ", int(e))
		}},
		{"nanosleep", func() string {
			start := time.Now()
			ts := unix.Timespec{Nsec: 900e6}
			_, _, e := unix.Syscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
			return fmt.Sprint(int(e), time.Since(start) >= 900*time.Millisecond, time.Since(start) < 3*time.Second)
		}},
		{"read", func() string {
			b := make([]byte, 4)
			n, err := unix.Read(v.pipes[1][0], b)
			return fmt.Sprint(n, " ", err == nil, " ", string(b))
		}},
		{"spin", func() string {
			sum, i := uint64(0), uint64(0)
			for ; !v.spin.Load() || i < 1e6; i++ {
				sum += i ^ 0x5555
			}
			want := uint64(0)
			for j := range i {
				want += j ^ 0x5555
			}
			return fmt.Sprint(sum == want)
		}},
	} {
		run(b.name, b.f)
		all = append(all, <-tids)
	}
	return strings.Join(all, " ")
}

// unblock ends what block began and prints name=result.
func (v *victim) unblock() string {
	v.spin.Store(true)
	var all []string
	wake := func() {
		unix.Write(v.pipes[0][1], []byte("x"))
		unix.Write(v.pipes[1][1], []byte("data"))
		atomic.StoreUint32(&v.word, 1)
		unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&v.word)), 1, 64, 0, 0, 0)
	}
	wake()
	for range 5 {
		select {
		case r := <-v.results:
			all = append(all, strings.ReplaceAll(r, " ", ","))
		case <-time.After(10 * time.Second):
			return "stuck after " + strings.Join(all, " ")
		}
	}
	return strings.Join(all, " ")
}

// --- the test's side of a victim --------------------------------------------

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
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	v := &victimProc{t: t, cmd: cmd, stdin: stdin, out: bufio.NewReader(stdout), done: make(chan struct{})}
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-v.done
	})
	line, err := v.out.ReadString('\n')
	go v.watch(t)
	if err != nil || line != "ready\n" {
		t.Fatalf("victim says %q, %v", line, err)
	}
	return v
}

// watch waits by pidfd and reaps afterwards: a wait for a child would be given
// the ptrace stops of this process's other threads.
func (v *victimProc) watch(t testing.TB) {
	defer close(v.done)
	fd, err := unix.PidfdOpen(v.pid(), 0)
	if err != nil {
		t.Error(err)
		return
	}
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

// do sends a command and gives the answer, or fails the test after 20 s.
func (v *victimProc) do(format string, args ...any) string {
	v.t.Helper()
	v.send(fmt.Sprintf(format, args...))
	timer := time.AfterFunc(20*time.Second, func() { v.cmd.Process.Kill() })
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
	case <-time.After(10 * time.Second):
		v.t.Fatal("victim still lives")
	}
}

// --- helpers ----------------------------------------------------------------

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
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
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
