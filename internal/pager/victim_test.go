package pager

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// The test binary is also the processes that the tests need: a VMM whose
// memory is served, and a pager that a Keeper starts.
const roleEnv = "PAGER_TEST_ROLE"

// versionEnv is what the pager role says of itself.
const versionEnv = "PAGER_TEST_VERSION"

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "":
		os.Exit(m.Run())
	case "vmm":
		vmmMain()
	case "pager":
		pagerMain(os.Args[1], os.Args[2])
	}
}

// pagerMain is what `wrenn pager` does.
func pagerMain(dir, socket string) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	store, err := snapshot.Open(filepath.Join(dir, "store"), snapshot.Options{ReadOnly: true})
	if err == nil {
		var s *Server
		if s, err = New(Options{Dir: filepath.Join(dir, "run"), Store: store, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), Version: os.Getenv(versionEnv)}); err == nil {
			err = s.Serve(ctx, socket)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// vmmMain obeys commands on standard input, one answer line each.
func vmmMain() {
	debug.SetGCPercent(-1)
	var mem []byte
	fail := func(err error) {
		if err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
	}
	fmt.Println("ready")
	for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
		f := strings.Fields(sc.Text())
		num := func(i int) (n int) { _, err := fmt.Sscan(f[i], &n); fail(err); return n }
		var err error
		switch f[0] {
		case "share": // path size
			fd, oerr := unix.Open(f[1], unix.O_RDWR, 0)
			fail(oerr)
			mem, err = unix.Mmap(fd, 0, num(2), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		case "handover": // path size lie: with memory of its own
			mem, err = unix.Mmap(-1, 0, num(2), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			fail(err)
			err = handOver(f[1], mem, num(3))
		case "sum":
			fmt.Printf("%x\n", sha256.Sum256(mem))
			continue
		case "peek":
			fmt.Println(mem[num(1)])
			continue
		case "poke":
			mem[num(1)] = byte(num(2))
		case "remove": // off n
			err = unix.Madvise(mem[num(1):num(1)+num(2)], unix.MADV_DONTNEED)
		}
		fail(err)
		fmt.Println("ok")
	}
}

// handOver does what Firecracker does. lie is added to the size it tells.
func handOver(path string, mem []byte, lie int) error {
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if e != 0 {
		return e
	}
	base := uintptr(unsafe.Pointer(&mem[0]))
	api := [3]uint64{0xaa, 1 << 3} // removals are told
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, fd, 0xc018aa3f, uintptr(unsafe.Pointer(&api))); e != 0 {
		return e
	}
	reg := [4]uint64{uint64(base), uint64(len(mem)), 1}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, fd, 0xc020aa00, uintptr(unsafe.Pointer(&reg))); e != 0 {
		return e
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	body := fmt.Sprintf(`[{"base_host_virt_addr":%d,"size":%d,"offset":0,"page_size":4096,"page_size_kib":4096}]`, base, len(mem)+lie)
	_, _, err = conn.WriteMsgUnix([]byte(body), unix.UnixRights(int(fd)), nil)
	return err
}

type vmmProc struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	done  chan struct{}
}

func startVMM(t testing.TB) *vmmProc {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{roleEnv + "=vmm"}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	v := &vmmProc{t: t, cmd: cmd, stdin: stdin, out: bufio.NewReader(stdout), done: make(chan struct{})}
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	must(t, err)
	go func() { // no wait(2): it would be given the stops of the tracing
		defer close(v.done)
		defer unix.Close(pidfd)
		for {
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1); err != unix.EINTR {
				break
			}
		}
		cmd.Process.Wait()
	}()
	t.Cleanup(v.kill)
	if line, err := v.answer(); line != "ready" {
		t.Fatalf("the VMM says %q, %v", line, err)
	}
	return v
}

func (v *vmmProc) pid() int { return v.cmd.Process.Pid }

func (v *vmmProc) kill() {
	v.cmd.Process.Kill()
	<-v.done
}

func (v *vmmProc) send(format string, args ...any) {
	v.t.Helper()
	_, err := fmt.Fprintf(v.stdin, format+"\n", args...)
	must(v.t, err)
}

func (v *vmmProc) answer() (string, error) {
	line, err := v.out.ReadString('\n')
	return strings.TrimSpace(line), err
}

func (v *vmmProc) do(format string, args ...any) string {
	v.t.Helper()
	v.send(format, args...)
	s, err := v.answer()
	if err != nil || strings.HasPrefix(s, "failed") {
		v.t.Fatalf("the VMM's answer to %q: %q, %v", fmt.Sprintf(format, args...), s, err)
	}
	return s
}

func (v *vmmProc) wantSum(want []byte) {
	v.t.Helper()
	if got := v.do("sum"); got != fmt.Sprintf("%x", sha256.Sum256(want)) {
		v.t.Fatal("the VMM sees other memory than it should")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it serves page faults of another process")
	}
}

// rig is a state directory with one image, and a pager for it.
type rig struct {
	t       testing.TB
	dir     string
	store   *snapshot.Store
	image   format.ID
	content []byte
	srv     *Server
	free    int64 // memory that the host has, as the pager is told
}

// newRig makes an image of so many MiB, every fourth of zeros.
func newRig(t testing.TB, mib int) *rig {
	t.Helper()
	needRoot(t)
	r := &rig{t: t, dir: t.TempDir()}
	var err error
	r.store, err = snapshot.Open(filepath.Join(r.dir, "store"), snapshot.Options{})
	must(t, err)
	t.Cleanup(func() { r.store.Close() })
	r.image, r.content = r.newImage(mib, 1)
	r.start()
	return r
}

func (r *rig) newImage(mib int, seed uint64) (format.ID, []byte) {
	r.t.Helper()
	content := make([]byte, mib<<20)
	for off := 0; off < len(content); off += 8 {
		if off>>20%4 != 3 {
			binary.LittleEndian.PutUint64(content[off:], (uint64(off)+seed)*0x9e3779b97f4a7c15)
		}
	}
	w, err := r.store.NewImage(int64(len(content)), nil)
	must(r.t, err)
	r.t.Cleanup(func() { w.Abort() })
	must(r.t, w.WriteAt(content, 0))
	id, err := w.Finish(context.Background())
	must(r.t, err)
	return id, content
}

// start makes a pager; a later one takes up what the one before served.
func (r *rig) start() {
	r.t.Helper()
	srv, err := New(Options{Dir: filepath.Join(r.dir, "run"), Store: r.store, Logger: slog.New(slog.DiscardHandler), Version: "test",
		OrderDir: filepath.Join(r.dir, "orders"), OrderWindow: time.Hour, LowWater: 1 << 20, WholeDir: filepath.Join(r.dir, "memory"),
		MemAvailable: func() (int64, error) { return r.free, nil },
	})
	must(r.t, err)
	r.srv = srv
	r.t.Cleanup(func() { must(r.t, srv.Close()) })
}

func (r *rig) prepare(id string) (path string) {
	r.t.Helper()
	p, err := call(r.srv.PrepareMemory, &pagerv1.PrepareMemoryRequest{SandboxId: id, ImageId: r.image.String()})
	must(r.t, err)
	return fmt.Sprintf("/proc/%d/fd/%d", p.Pid, p.Fd)
}

// shared starts a VMM whose memory is served from the shared image.
func (r *rig) shared(id string) *vmmProc {
	r.t.Helper()
	path := r.prepare(id)
	v := startVMM(r.t)
	v.do("share %s %d", path, len(r.content))
	a, err := call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: id, Pid: int32(v.pid())})
	must(r.t, err)
	if a.Address == 0 || a.Length != int64(len(r.content)) {
		r.t.Fatalf("attached at %#x, %d bytes", a.Address, a.Length)
	}
	return v
}

func (r *rig) socket(id string) string { return filepath.Join(r.dir, id+".sock") }

func (r *rig) prepareCopy(id string) {
	r.t.Helper()
	p, err := call(r.srv.PrepareMemory, &pagerv1.PrepareMemoryRequest{
		SandboxId: id, ImageId: r.image.String(), Mode: pagerv1.MemoryMode_MEMORY_MODE_COPY, SocketPath: r.socket(id),
	})
	must(r.t, err)
	if p.Pid != 0 || p.Fd != 0 || p.Size != int64(len(r.content)) {
		r.t.Fatalf("prepared %+v", p)
	}
}

func (r *rig) expect(id string, v *vmmProc) {
	r.t.Helper()
	a, err := call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: id, Pid: int32(v.pid())})
	must(r.t, err)
	if a.Length != int64(len(r.content)) {
		r.t.Fatalf("attached %d bytes", a.Length)
	}
}

// copied starts a VMM that hands its userfaultfd over.
func (r *rig) copied(id string) *vmmProc {
	r.t.Helper()
	r.prepareCopy(id)
	v := startVMM(r.t)
	r.expect(id, v)
	v.do("handover %s %d 0", r.socket(id), len(r.content))
	return v
}

func (r *rig) stats(id string) *pagerv1.GetStatsResponse {
	r.t.Helper()
	st, err := call(r.srv.GetStats, &pagerv1.GetStatsRequest{SandboxId: id})
	must(r.t, err)
	return st
}

func (r *rig) release(id string) {
	r.t.Helper()
	_, err := call(r.srv.ReleaseMemory, &pagerv1.ReleaseMemoryRequest{SandboxId: id})
	must(r.t, err)
}

// files lists what lies in the pager's directory.
func (r *rig) files() []string {
	r.t.Helper()
	entries, err := os.ReadDir(filepath.Join(r.dir, "run"))
	must(r.t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func call[Q, A any](f func(context.Context, *connect.Request[Q]) (*connect.Response[A], error), q *Q) (*A, error) {
	r, err := f(context.Background(), connect.NewRequest(q))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

func wantCode(t testing.TB, err error, code connect.Code, text string) {
	t.Helper()
	var c *connect.Error
	if !errors.As(err, &c) || c.Code() != code || !strings.Contains(err.Error(), text) {
		t.Errorf("error is %v, want %v with %q in it", err, code, text)
	}
}
