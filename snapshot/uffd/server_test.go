//go:build linux && amd64

package uffd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

func TestFaultsAreServedFromTheImage(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name  string
		o     victimOptions
		devFD int
	}{
		{"system call", victimOptions{}, -1},
		{"inherited device", victimOptions{devFD: true}, 4},
		{"inherited device, unprivileged", victimOptions{devFD: true, uid: 65534}, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			img := newTestImage(16)
			shared := newTestShared(t, img)
			srv := newTestServer(t, Options{OnFatal: func(id string, err error) { t.Errorf("fatal %s: %v", id, err) }})
			v := startVictim(t, shared, tc.o)
			mustAdd(t, srv, "v", mustInject(t, v, shared, tc.devFD))
			v.do("touch 4")
			v.wantSum(img.content())
			st, err := srv.Stats("v")
			if err != nil {
				t.Fatal(err)
			}
			var data int64
			for off := int64(0); off < img.size; off += pageSize {
				if !img.zero(off) {
					data += pageSize
				}
			}
			if int64(st.BytesFilled) != data || shared.Resident() != data {
				t.Errorf("filled %d, resident %d, image has %d bytes of data", st.BytesFilled, shared.Resident(), data)
			}
			if got, want := st.ZeroFaults, uint64(1); got < want {
				t.Errorf("%d faults in zeros", got)
			}
			if n := sum(st.ServiceTime[:]); n == 0 || n > st.Faults {
				t.Errorf("histogram counts %d of %d faults", n, st.Faults)
			}
		})
	}
}

func sum(v []uint64) (n uint64) {
	for _, x := range v {
		n += x
	}
	return n
}

func TestUnreadablePageKills(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	broken := int64(3 << 20)
	reason := errors.New("checksum does not match")
	img.fail = func(off, n int64) error {
		if off <= broken && broken < off+n {
			return reason
		}
		return nil
	}
	shared := newTestShared(t, img)
	type report struct {
		id  string
		err error
	}
	reports := make(chan report, 4)
	srv := newTestServer(t, Options{OnFatal: func(id string, err error) { reports <- report{id, err} }})
	v, other := startVictim(t, shared, victimOptions{}), startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "v", mustInject(t, v, shared, -1))
	mustAdd(t, srv, "other", mustInject(t, other, shared, -1))
	// Its neighbours in the cluster can still be had.
	want := img.content()
	if got := v.do("peek %d", broken+pageSize); got != fmt.Sprint(want[broken+pageSize]) {
		t.Errorf("page beside the broken one reads %s", got)
	}
	v.send(fmt.Sprintf("peek %d", broken))
	if s, err := v.answer(); err == nil {
		t.Fatalf("the unreadable page was read as %q", s)
	}
	v.wantDead()
	select {
	case r := <-reports:
		if r.id != "v" || !errors.Is(r.err, reason) {
			t.Errorf("reported %q: %v", r.id, r.err)
		}
	case <-time.After(time.Minute):
		t.Error("nothing reported")
	}
	if got := other.do("sum 0 4096"); got == "" {
		t.Error("other VM does not answer")
	}
	if err := srv.Remove("v"); err != nil {
		t.Error(err)
	}
	if len(reports) != 0 {
		t.Errorf("%d more reports", len(reports))
	}
}

func TestServersTakeTurnsUnderLoad(t *testing.T) {
	needRoot(t)
	img := newTestImage(16)
	img.delay = 300 * time.Microsecond
	shared := newTestShared(t, img)
	v := startVictim(t, shared, victimOptions{})
	a := mustInject(t, v, shared, -1)
	v.send("touch 4")
	for i := range 10 {
		srv := newTestServer(t, Options{ClusterSize: 4096 << (i % 3), Workers: 2})
		mustAdd(t, srv, "v", a)
		for range 10000 { // let it do something; it may have seen everything
			if st, _ := srv.Stats("v"); st.Faults >= 8 {
				break
			}
			time.Sleep(100 * time.Microsecond)
		}
		if i%2 == 0 {
			if err := srv.Remove("v"); err != nil {
				t.Fatal(err)
			}
		}
		srv.Close()
		if err := srv.Add("v", a); err == nil {
			t.Error("closed server took an attachment")
		}
		rec := a.Record()
		var err error
		if a, err = Reattach(context.Background(), rec, shared); err != nil {
			t.Fatal(err)
		}
	}
	srv := newTestServer(t, Options{})
	mustAdd(t, srv, "v", a)
	if err := srv.Add("v", a); err == nil {
		t.Error("one name added twice")
	}
	if s, err := v.answer(); s != "ok" {
		t.Fatalf("victim says %q, %v", s, err)
	}
	v.wantSum(img.content())
}

func TestManyClonesFillEachPageOnce(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	img.delay = 100 * time.Microsecond
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{Workers: 3})
	var clones []*victimProc
	for i := range 4 {
		v := startVictim(t, shared, victimOptions{})
		mustAdd(t, srv, fmt.Sprint(i), mustInject(t, v, shared, -1))
		clones = append(clones, v)
	}
	for _, v := range clones {
		v.send("touch 3") // all at once
	}
	for _, v := range clones {
		if s, err := v.answer(); s != "ok" {
			t.Fatalf("victim says %q, %v", s, err)
		}
		v.wantSum(img.content())
	}
	var filled int64
	for i := range clones {
		st, err := srv.Stats(fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		filled += int64(st.BytesFilled)
	}
	if filled != shared.Resident() {
		t.Errorf("%d bytes were put in, %d are there: some were read twice", filled, shared.Resident())
	}
	if _, err := srv.Stats("9"); err == nil {
		t.Error("statistics of nobody")
	}
	if err := srv.Remove("9"); err == nil {
		t.Error("removed nobody")
	}
	if err := shared.Close(); err == nil {
		t.Error("closed a shared image with attachments")
	}
}

func TestServingAllocatesNothing(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	v := startVictim(t, shared, victimOptions{})
	a := mustInject(t, v, shared, -1)
	mustAdd(t, srv, "v", a)
	sv := srv.served["v"]
	buf := make([]byte, DefaultClusterSize)
	off := int64(0)
	for name, advance := range map[string]func(){
		"data": func() {
			off = (off + DefaultClusterSize) % img.zeroFrom
			if err := shared.Punch(off, DefaultClusterSize); err != nil {
				t.Fatal(err)
			}
		},
		"zero":  func() { off = img.zeroFrom },
		"there": func() { off = 0 },
	} {
		n := testing.AllocsPerRun(50, func() {
			advance()
			if err := srv.serve(sv, buf, off); err != nil {
				t.Fatal(err)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations per fault", name, n)
		}
	}
	msgs := make([]byte, 2*msgSize)
	for i := range 2 {
		msgs[i*msgSize] = eventPagefault
		binary.NativeEndian.PutUint64(msgs[i*msgSize+16:], uint64(a.rec.Addr)+uint64(i)*pageSize)
	}
	if n := testing.AllocsPerRun(50, func() { srv.enqueue(sv, msgs) }); n != 0 {
		t.Errorf("%v allocations per batch of events", n)
	}
}

// One page that does not come must not hold up the other threads of its VM:
// where pages come slowly the reader leaves them to the workers.
func TestSlowPagesAreLeftToWorkers(t *testing.T) {
	needRoot(t)
	img := &testImage{size: 4 << 20}
	gate := make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	var first, others atomic.Int64
	first.Store(-1)
	img.fail = func(off, _ int64) error {
		if first.CompareAndSwap(-1, off) {
			<-gate // until four other clusters have been read
		} else if others.Add(1) == 4 {
			open()
		}
		return nil
	}
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{Workers: 2})
	t.Cleanup(open) // a server with a fault at work would not close
	v := startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "v", mustInject(t, v, shared, -1))
	srv.served["v"].pace(2 * slowFault)
	v.do("touch 2")
	v.wantSum(img.content())
}

// A signal to a thread that waits for a page has it raise the fault again. That
// keeps no further worker busy, and does not fill the queue.
func TestFaultRaisedAgainIsServedOnce(t *testing.T) {
	needRoot(t)
	img := &testImage{size: 4 << 20}
	reading, gate := make(chan struct{}), make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	var first atomic.Bool
	img.fail = func(int64, int64) error {
		if first.CompareAndSwap(false, true) {
			close(reading)
			<-gate
		}
		return nil
	}
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{Workers: 2})
	t.Cleanup(open)
	v := startVictim(t, shared, victimOptions{})
	a := mustInject(t, v, shared, -1)
	mustAdd(t, srv, "v", a)
	sv := srv.served["v"]
	sv.pace(2 * slowFault)
	v.send("peek 0")
	<-reading
	msg := make([]byte, msgSize)
	msg[0] = eventPagefault
	binary.NativeEndian.PutUint64(msg[16:], uint64(a.rec.Addr))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range 2 * cap(srv.queue) {
			srv.enqueue(sv, msg)
		}
	}()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the queue is full of one page")
	}
	if n := len(srv.queue); n != 0 {
		t.Errorf("%d faults for a page that is coming wait in the queue", n)
	}
	open()
	if s, err := v.answer(); s != fmt.Sprint(img.content()[0]) {
		t.Errorf("the page reads %q, %v", s, err)
	}
	v.wantSum(img.content())
}

func TestPaceOfFaults(t *testing.T) {
	var v served
	for i := range 3 {
		v.pace(slowFault + 1)
		for n := range int32(slowFaults) {
			if left := v.slow.Load(); left != slowFaults-n {
				t.Fatalf("round %d, after %d quick faults %d are left to workers", i, n, left)
			}
			v.pace(slowFault)
		}
		if v.pace(0); v.slow.Load() != 0 {
			t.Fatal("the reader does not serve again")
		}
	}
}

// BenchmarkFault measures what a guest waits for a page: a fault of a process
// through the kernel, the poller, a worker and back, image in RAM. One
// operation touches 64 MiB in one thread.
func BenchmarkFault(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: it attaches to a process by ptrace")
	}
	for _, cluster := range []int{4 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("%dKiB", cluster>>10), func(b *testing.B) {
			img := &testImage{size: 64 << 20}
			// From memory, so that the image costs nothing.
			content := img.content()
			shared := newTestShared(b, &memImage{testImage: img, content: content})
			srv := newTestServer(b, Options{ClusterSize: cluster})
			v := startVictim(b, shared, victimOptions{})
			mustAdd(b, srv, "v", mustInject(b, v, shared, -1))
			b.SetBytes(img.size)
			for b.Loop() {
				if err := shared.Punch(0, img.size); err != nil {
					b.Fatal(err)
				}
				v.do("touch 1")
			}
			st, _ := srv.Stats("v")
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(st.Faults), "µs/fault")
			b.ReportMetric(float64(st.Faults)/float64(b.N), "faults/op")
		})
	}
}

// memImage is a testImage whose content has been computed.
type memImage struct {
	*testImage
	content []byte
}

func (m *memImage) Span(off int64) (format.Kind, int64) { return format.Data, m.size - off }

func (m *memImage) ReadAt(p []byte, off int64) (int, error) { return copy(p, m.content[off:]), nil }

func TestFaultOfAProcessThatEndedIsNoNews(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{OnFatal: func(id string, err error) { t.Errorf("fatal %s: %v", id, err) }})
	v := startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "v", mustInject(t, v, shared, -1))
	v.cmd.Process.Kill()
	v.wantDead()
	buf := make([]byte, DefaultClusterSize)
	for _, off := range []int64{0, img.zeroFrom} {
		if err := srv.serve(srv.served["v"], buf, off); err != nil {
			t.Errorf("fault at %d: %v", off, err)
		}
	}
	srv.fatal(srv.served["v"], errors.New("too late to matter"))
}

func TestWrongPageMetWhileFillingIsReplaced(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	reports := make(chan error, 2)
	srv := newTestServer(t, Options{OnFatal: func(id string, err error) { reports <- err }})
	v := startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "v", mustInject(t, v, shared, -1))
	// Somebody writes into the second page of a cluster whose first is absent.
	if _, err := shared.File().WriteAt([]byte("wrong"), pageSize); err != nil {
		t.Fatal(err)
	}
	if got := v.do("peek 0"); got != fmt.Sprint(img.content()[0]) {
		t.Errorf("page beside the wrong one reads %s", got)
	}
	v.wantSum(img.content())
	if len(reports) != 0 {
		t.Errorf("reported %v", <-reports)
	}
}
