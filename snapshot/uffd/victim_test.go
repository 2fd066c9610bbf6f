//go:build linux && amd64

package uffd

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// victimMain maps descriptor 3 shared, if it is not for copy mode, and obeys
// commands on standard input, one answer line each.
func victimMain() {
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(8) // a goroutine in a page fault keeps its processor
	v := &victim{}
	if os.Getenv(victimEnv) != "copy" {
		var st unix.Stat_t
		if err := unix.Fstat(3, &st); err != nil {
			victimFail("fstat", err)
		}
		mem, err := unix.Mmap(3, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			victimFail("mmap", err)
		}
		v.mem = mem
	}
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
	copy    copyVictim
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
	return v.doCopy(f, num)
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
			return fmt.Sprint(int(e), time.Since(start) >= 900*time.Millisecond, time.Since(start) < time.Minute)
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
		case <-time.After(time.Minute):
			return "stuck after " + strings.Join(all, " ")
		}
	}
	return strings.Join(all, " ")
}
