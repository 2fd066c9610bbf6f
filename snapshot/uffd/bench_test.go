//go:build linux && amd64

package uffd

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// benchVictim is a victim in copy mode whose memory can be emptied without an
// event, so that it can be filled again.
func benchVictim(b *testing.B, img *testImage) (*copyRig, *Attachment) {
	b.Helper()
	if os.Geteuid() != 0 {
		b.Skip("needs root: it makes a userfaultfd for kernel faults")
	}
	r := newCopyRig(b, img)
	r.do("uffd 0")
	a, err := r.offer(context.Background(), r.handover(), "u")
	if err != nil {
		b.Fatal(err)
	}
	return r, a
}

// bareLoop is the least that can serve faults: one thread of its own that
// waits, reads one event, reads the cluster from src, copies it and waits again.
func bareLoop(a *Attachment, src Source, cluster int64, stop int) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var msg [msgSize]byte
	buf := make([]byte, cluster)
	fds := []unix.PollFd{{Fd: int32(a.fd), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		if n, err := unix.Read(a.fd, msg[:]); n != msgSize || err != nil {
			continue
		}
		addr := binary.NativeEndian.Uint64(msg[16:])
		r := a.locate(addr)
		start := max((r.Offset+int64(addr-r.Addr))&^(cluster-1), r.Offset)
		b := buf[:min(start&^(cluster-1)+cluster, r.end())-start]
		if _, err := src.ReadAt(b, start); err != nil {
			return
		}
		c := uffdioCopy{dst: r.Addr + uint64(start-r.Offset), src: &b[0], length: uint64(len(b))}
		_ = ioctlCopyPages(a.fd, &c)
	}
}

// BenchmarkServiceAgainstBareLoop compares the server with a bare fault-copy
// loop, one guest thread each, in turn, so that what else the machine does
// falls on both. Both read
// from the same source, an image in memory that is all data. ratio is the
// loop's time over ours, the median over the turns.
func BenchmarkServiceAgainstBareLoop(b *testing.B) {
	for _, cluster := range []int{4 << 10, DefaultClusterSize} {
		b.Run(fmt.Sprintf("cluster=%d", cluster), func(b *testing.B) {
			img := &testImage{size: 32 << 20}
			mem := &memImage{testImage: img, content: img.content()}
			bare, ba := benchVictim(b, img)
			ours, oa := benchVictim(b, img)
			oa.src = mem
			srv := newTestServer(b, Options{ClusterSize: cluster})
			mustAdd(b, srv, "v", oa)
			var pipe [2]int
			if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
				b.Fatal(err)
			}
			done := make(chan struct{})
			go func() { bareLoop(ba, mem, int64(cluster), pipe[0]); close(done) }()
			defer func() { unix.Close(pipe[1]); <-done; unix.Close(pipe[0]); ba.Close() }()
			var sum [2]time.Duration
			var ratios []float64
			for b.Loop() {
				var took [2]time.Duration
				for i, v := range []*copyRig{bare, ours} {
					v.do("remove 0 %d", img.size)
					start := time.Now()
					v.do("touch 1")
					took[i] = time.Since(start)
					sum[i] += took[i]
				}
				ratios = append(ratios, float64(took[0])/float64(took[1]))
			}
			st, _ := srv.Stats("v")
			faults := float64(st.Faults)
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "ratio")
			b.ReportMetric(float64(sum[1].Nanoseconds())/1000/faults, "µs/fault")
			b.ReportMetric(float64(sum[0].Nanoseconds())/1000/faults, "bare-µs/fault")
			b.ReportMetric(faults/float64(b.N), "faults")
		})
	}
}

// BenchmarkFourClones serves four guests at once, and tells how many
// goroutines there were for it at most, the victims' own apart.
func BenchmarkFourClones(b *testing.B) {
	img := &testImage{size: 32 << 20}
	mem := &memImage{testImage: img, content: img.content()}
	srv := newTestServer(b, Options{})
	var vs []*copyRig
	before := runtime.NumGoroutine()
	for i := range 4 {
		v, a := benchVictim(b, img)
		a.src = mem
		mustAdd(b, srv, fmt.Sprint(i), a)
		vs = append(vs, v)
	}
	most, took := 0, [2]time.Duration{}
	run := func(vs []*copyRig) time.Duration {
		for _, v := range vs {
			v.do("remove 0 %d", img.size)
		}
		start := time.Now()
		for _, v := range vs {
			v.send("touch 1")
		}
		for _, v := range vs {
			most = max(most, runtime.NumGoroutine())
			if s, err := v.answer(); s != "ok" {
				b.Fatal(s, err)
			}
		}
		return time.Since(start)
	}
	for b.Loop() {
		took[0] += run(vs[:1])
		took[1] += run(vs)
	}
	// Each victim has a goroutine of the test's own that waits for its end.
	b.ReportMetric(float64(most-before-len(vs)), "goroutines")
	b.ReportMetric(4*float64(took[0])/float64(took[1]), "×-one-clone's-speed")
}

// BenchmarkColdStart reads a third of an image on disk in an order that was
// recorded before, without and with reading ahead, in turn; both begin at once.
func BenchmarkColdStart(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: it attaches to a process by ptrace")
	}
	img := &testImage{size: 48 << 20}
	mem := &memImage{testImage: img, content: img.content()}
	var order []uint32
	for c := range uint32(img.size / DefaultClusterSize / 3) {
		order = append(order, c*37%uint32(img.size/DefaultClusterSize))
	}
	shared := newTestShared(b, mem)
	srv := newTestServer(b, Options{})
	v := startVictim(b, shared, victimOptions{})
	mustAdd(b, srv, "v", mustInject(b, v, shared, -1))
	var took [2]time.Duration
	var faults [2]uint64
	for b.Loop() {
		for ahead := range 2 {
			if err := shared.Punch(0, img.size); err != nil {
				b.Fatal(err)
			}
			st, _ := srv.Stats("v")
			start := time.Now()
			done := make(chan struct{})
			go func() {
				defer close(done)
				if ahead == 1 {
					_, _ = srv.Prefetch(context.Background(), shared, order)
				}
			}()
			for _, c := range order {
				v.do("peek %d", int64(c)*DefaultClusterSize)
			}
			took[ahead] += time.Since(start)
			<-done
			now, _ := srv.Stats("v")
			faults[ahead] += now.Faults - st.Faults
		}
	}
	b.ReportMetric(float64(took[0])/float64(took[1]), "×-faster")
	b.ReportMetric(float64(faults[0])/float64(b.N), "faults-without")
	b.ReportMetric(float64(faults[1])/float64(b.N), "faults-with")
}
