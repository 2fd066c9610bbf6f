//go:build linux && amd64

package uffd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// copyVictim is the part of a victim that plays a VMM with memory of its own.
type copyVictim struct {
	uffd int
	conn *net.UnixConn
}

// doCopy obeys the commands for copy mode.
func (v *victim) doCopy(f []string, num func(int) int) string {
	switch f[0] {
	case "map": // n: anonymous memory, answers its address
		mem, err := unix.Mmap(-1, 0, num(1), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err != nil {
			victimFail("mmap", err)
		}
		unix.Madvise(mem, unix.MADV_NOHUGEPAGE)
		v.mem = mem
		return fmt.Sprint(uintptr(unsafe.Pointer(&mem[0])))
	case "uffd": // features: makes a userfaultfd and registers all of memory
		fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
		if e != 0 {
			victimFail("userfaultfd", e)
		}
		v.copy.uffd = int(fd)
		a := uffdioAPI{api: uffdAPI, features: uint64(num(1))}
		if err := ioctl(v.copy.uffd, ioctlAPI, unsafe.Pointer(&a)); err != nil {
			victimFail("UFFDIO_API", err)
		}
		if err := register(v.copy.uffd, uintptr(unsafe.Pointer(&v.mem[0])), int64(len(v.mem)), canCopy|canZeropage|canWake); err != nil {
			victimFail("register", err)
		}
		return "ok"
	case "send": // path hex fds…: connects and sends bytes with descriptors; u is the userfaultfd
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: f[1], Net: "unix"})
		if err != nil {
			victimFail("dial", err)
		}
		v.copy.conn = conn
		body, err := hex.DecodeString(f[2])
		if err != nil {
			victimFail("hex", err)
		}
		var fds []int
		for _, s := range f[3:] {
			if s == "u" {
				fds = append(fds, v.copy.uffd)
			} else {
				fds = append(fds, 0)
			}
		}
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		if _, _, err := conn.WriteMsgUnix(body, oob, nil); err != nil {
			return "send: " + err.Error()
		}
		return "ok"
	case "hangup":
		v.copy.conn.Close()
		return "ok"
	case "closeuffd":
		unix.Close(v.copy.uffd)
		return "ok"
	case "blocking":
		unix.SetNonblock(v.copy.uffd, false)
		return "ok"
	case "remove": // off n
		if err := unix.Madvise(v.mem[num(1):num(1)+num(2)], unix.MADV_DONTNEED); err != nil {
			victimFail("remove", err)
		}
		return "ok"
	case "unmap": // off n
		p := uintptr(unsafe.Pointer(&v.mem[num(1)]))
		if _, _, e := unix.Syscall(unix.SYS_MUNMAP, p, uintptr(num(2)), 0); e != 0 {
			victimFail("unmap", e)
		}
		return "ok"
	case "churn": // threads steps seed rotation
		return v.churn(num(1), num(2), uint64(num(3)), num(4))
	}
	victimFail(f[0], errors.New("unknown command"))
	return ""
}

// churn has threads read, write and give back pages of their own, and compare
// each with what it must hold: the image, what was written, or zeros.
func (v *victim) churn(threads, steps int, seed uint64, rotation int) string {
	img := &testImage{size: int64(len(v.mem)), zeroFrom: int64(len(v.mem)) / 4, zeroTo: int64(len(v.mem)) / 2}
	const own = 7 // pages in a row that one thread has: no divisor of a cluster
	var wg sync.WaitGroup
	bad := make(chan string, threads)
	for t := range threads {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(t)))
			model := map[int][]byte{} // page: content, if not the image's
			want := make([]byte, pageSize)
			blocks := len(v.mem) / pageSize / own
			for range steps {
				b := (rng.IntN(blocks)/threads*threads + t) % blocks
				if b%threads != t {
					continue
				}
				p := b*own + rng.IntN(own)
				page := v.mem[p*pageSize : (p+1)*pageSize]
				switch rng.IntN(4) {
				case 0:
					n := 1 + rng.IntN((b+1)*own-p)
					if err := unix.Madvise(v.mem[p*pageSize:(p+n)*pageSize], unix.MADV_DONTNEED); err != nil {
						bad <- err.Error()
						return
					}
					for q := p; q < p+n; q++ {
						model[q] = make([]byte, pageSize)
					}
				case 1:
					at := rng.IntN(pageSize)
					page[at]++
					m := model[p]
					if m == nil {
						m = make([]byte, pageSize)
						img.fill(m, (int64(p)*pageSize+int64(rotation))%img.size)
						model[p] = m
					}
					m[at]++
				default:
					exp := model[p]
					if exp == nil {
						img.fill(want, (int64(p)*pageSize+int64(rotation))%img.size)
						exp = want
					}
					if !bytes.Equal(page, exp) {
						bad <- fmt.Sprintf("page-%d-differs,-changed-%v", p, model[p] != nil)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	select {
	case s := <-bad:
		return s
	default:
		return "ok"
	}
}

const featureEventRemove = 1 << 3

// copyRig is a victim in copy mode and the socket it hands over on.
type copyRig struct {
	*victimProc
	img      *testImage
	base     uint64
	rotation int64 // image offset at the start of the victim's memory
	listener *net.UnixListener
	socket   string
	mapPath  string
}

// newCopyRig starts a victim whose memory holds the image in two regions, the
// second one first.
func newCopyRig(t testing.TB, img *testImage) *copyRig {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{victimEnv + "=copy"}
	cmd.Stderr = os.Stderr
	v := runVictim(t, cmd)
	dir := t.TempDir()
	r := &copyRig{victimProc: v, img: img, rotation: img.size * 3 / 8, socket: filepath.Join(dir, "s"), mapPath: filepath.Join(dir, "v.pages")}
	if _, err := fmt.Sscan(v.do("map %d", img.size), &r.base); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	r.listener = l
	return r
}

func (r *copyRig) regions() []Region {
	first := r.img.size - r.rotation
	return []Region{{Addr: r.base, Size: first, Offset: r.rotation}, {Addr: r.base + uint64(first), Size: r.rotation, Offset: 0}}
}

// handover is the JSON that Firecracker would send.
func (r *copyRig) handover() string {
	var wire []map[string]uint64
	for _, g := range r.regions() {
		wire = append(wire, map[string]uint64{"base_host_virt_addr": g.Addr, "size": uint64(g.Size), "offset": uint64(g.Offset), "page_size": 4096, "page_size_kib": 4096})
	}
	b, err := json.Marshal(wire)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

// content is what the victim's memory holds at first.
func (r *copyRig) content() []byte {
	c := r.img.content()
	return append(c[r.rotation:], c[:r.rotation]...)
}

// at is where in the victim's memory an offset of the image lies.
func (r *copyRig) at(off int64) int64 { return (off - r.rotation + r.img.size) % r.img.size }

func (r *copyRig) newMap() *PageMap {
	r.t.Helper()
	m, err := CreatePageMap(r.mapPath, r.img.size)
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

// attach hands over as it should be done.
func (r *copyRig) attach() *Attachment {
	r.t.Helper()
	r.do("uffd %d", featureEventRemove)
	a, err := r.offer(context.Background(), r.handover(), "u")
	if err != nil {
		r.t.Fatal(err)
	}
	return a
}

// offer sends a message and gives what became of it.
func (r *copyRig) offer(ctx context.Context, body, fds string) (*Attachment, error) {
	r.t.Helper()
	p, err := OpenPeer(r.pid())
	if err != nil {
		r.t.Fatal(err)
	}
	defer p.Close()
	m := r.newMap()
	r.do("send %s %x %s", r.socket, body, fds)
	a, err := p.Accept(ctx, r.listener, r.img, m, nil)
	if err != nil {
		m.Close()
	}
	return a, err
}

// reattach is what the next server does.
func (r *copyRig) reattach(rec AttachmentRecord) (*Attachment, error) {
	m, err := OpenPageMap(r.mapPath, r.img.size)
	if err != nil {
		return nil, err
	}
	a, err := ReattachCopy(context.Background(), rec, r.img, m)
	if err != nil {
		m.Close()
	}
	return a, err
}

func runVictim(t testing.TB, cmd *exec.Cmd) *victimProc {
	t.Helper()
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
	pidfd, err := unix.PidfdOpen(v.pid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	go v.watch(pidfd)
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-v.done
		// Nobody calls cmd.Wait, which would close them.
		stdin.Close()
		stdout.Close()
	})
	line, err := v.out.ReadString('\n')
	if err != nil || line != "ready\n" {
		t.Fatalf("victim says %q, %v", line, err)
	}
	return v
}
