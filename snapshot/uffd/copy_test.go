//go:build linux && amd64

package uffd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCopyModeServesEveryRegion(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(16))
	srv := newTestServer(t, Options{OnFatal: func(id string, err error) { t.Errorf("fatal %s: %v", id, err) }})
	mustAdd(t, srv, "v", r.attach())
	r.do("touch 4")
	r.wantSum(r.content())
	st, err := srv.Stats("v")
	if err != nil {
		t.Fatal(err)
	}
	var data uint64
	for off := int64(0); off < r.img.size; off += pageSize {
		if !r.img.zero(off) {
			data += pageSize
		}
	}
	if st.BytesFilled != data {
		t.Errorf("filled %d bytes, the image has %d of data", st.BytesFilled, data)
	}
	if most := uint64(r.img.size / DefaultClusterSize * 4 * 3); st.Faults == 0 || st.Faults > most {
		t.Errorf("%d faults for %d clusters", st.Faults, r.img.size/DefaultClusterSize)
	}
	order, err := srv.Touched("v")
	if err != nil || len(order) == 0 {
		t.Errorf("%d clusters recorded, %v", len(order), err)
	}
}

func TestRemovedPagesStayZeros(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(8))
	srv := newTestServer(t, Options{OnFatal: func(id string, err error) { t.Errorf("fatal %s: %v", id, err) }})
	mustAdd(t, srv, "v", r.attach())
	want := r.content()
	// Some were read before, some never; ranges lie across clusters, regions
	// and what the image has of zeros.
	for _, p := range [][2]int64{{3, 1}, {30, 3}, {100, 200}, {r.at(0)/pageSize - 5, 10}, {r.at(r.img.zeroFrom)/pageSize - 3, 9}, {2047, 1}} {
		off, n := p[0]*pageSize, p[1]*pageSize
		if p[0]%2 == 0 {
			r.do("sum %d %d", off, n)
		}
		r.do("remove %d %d", off, n)
		clear(want[off : off+n])
	}
	r.wantSum(want)
	// What is written after a removal is the guest's, until removed again.
	r.do("poke %d 9", 101*pageSize)
	want[101*pageSize] = 9
	r.wantSum(want)
	r.do("remove %d %d", 101*pageSize, pageSize)
	want[101*pageSize] = 0
	r.wantSum(want)
	if st, _ := srv.Stats("v"); st.Removed == 0 || st.Removed > uint64(r.img.size) {
		t.Errorf("%d bytes removed", st.Removed)
	}
}

func TestThreadsThatReadWriteAndRemove(t *testing.T) {
	needRoot(t)
	for _, cluster := range []int{4 << 10, 64 << 10, 1 << 20} {
		r := newCopyRig(t, newTestImage(8))
		srv := newTestServer(t, Options{ClusterSize: cluster, OnFatal: func(id string, err error) { t.Errorf("fatal %s: %v", id, err) }})
		mustAdd(t, srv, "v", r.attach())
		if got := r.do("churn 4 3000 %d %d", cluster, r.rotation); got != "ok" {
			t.Errorf("cluster %d: %s", cluster, got)
		}
		st, _ := srv.Stats("v")
		t.Logf("cluster %d: %d faults, %d retries, %d bytes removed", cluster, st.Faults, st.Retries, st.Removed)
	}
}

func TestCopyServersTakeTurnsUnderLoad(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(8))
	r.img.delay = 200 * time.Microsecond
	a := r.attach()
	rec := a.Record()
	r.send(fmt.Sprintf("churn 4 4000 7 %d", r.rotation))
	for i := range 12 {
		srv := newTestServer(t, Options{ClusterSize: 4096 << (i % 5), Workers: 3, OnFatal: func(id string, err error) { t.Errorf("fatal %s: %v", id, err) }})
		mustAdd(t, srv, "v", a)
		for range 10000 { // let it do something; it may have seen everything
			if st, _ := srv.Stats("v"); st.Faults >= 20 {
				break
			}
			time.Sleep(100 * time.Microsecond)
		}
		srv.Close()
		var err error
		if a, err = r.reattach(rec); err != nil {
			t.Fatal(err)
		}
	}
	srv := newTestServer(t, Options{OnFatal: func(id string, err error) { t.Errorf("fatal %s: %v", id, err) }})
	mustAdd(t, srv, "v", a)
	if s, err := r.answer(); s != "ok" {
		t.Fatalf("victim says %q, %v", s, err)
	}
}

// TestRemovalReadByADyingServerIsKept: the kernel tells of a removal once.
func TestRemovalReadByADyingServerIsKept(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(4))
	a := r.attach()
	rec := a.Record()
	r.send(fmt.Sprintf("remove %d %d", 20*pageSize, 5*pageSize))
	waitReadable(t, a.fd)
	// Read, and die before anything is noted.
	if n, err := unix.Read(a.fd, a.pages.events); err != nil || n != msgSize {
		t.Fatalf("read %d bytes of events, %v", n, err)
	}
	if s, err := r.answer(); s != "ok" {
		t.Fatalf("victim says %q, %v", s, err)
	}
	if a.pages.count.Load() != 0 {
		t.Fatal("noted already")
	}
	a.Close()
	a, err := r.reattach(rec)
	if err != nil {
		t.Fatal(err)
	}
	srv := newTestServer(t, Options{})
	mustAdd(t, srv, "v", a)
	want := r.content()
	clear(want[20*pageSize : 25*pageSize])
	r.wantSum(want)
}

func waitReadable(t *testing.T, fd int) {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 10000); n != 1 {
		t.Fatalf("no event comes: %v", err)
	}
}

// TestFaultDuringARemovalIsTriedAgain: as long as the event of a removal is
// not read, the kernel refuses to fill.
func TestFaultDuringARemovalIsTriedAgain(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(4))
	a := r.attach()
	srv := newTestServer(t, Options{})
	f, err := pollable(a.fd)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer a.Close()
	v := &served{Attachment: a, id: "v", file: f, touched: make([]uint64, 8)} // without a reader
	r.send(fmt.Sprintf("remove %d %d", r.at(0), 2*pageSize))
	waitReadable(t, a.fd)
	buf := make([]byte, DefaultClusterSize)
	for name, off := range map[string]int64{"removed page": 0, "another page": 8 * pageSize, "zeros": r.img.zeroFrom} {
		if err := srv.serve(v, buf, off); !errors.Is(err, errChanging) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := v.readCopyEvents(); err != nil {
		t.Fatal(err)
	}
	if s, err := r.answer(); s != "ok" {
		t.Fatalf("victim says %q, %v", s, err)
	}
	for _, off := range []int64{0, 8 * pageSize, r.img.zeroFrom} {
		if err := srv.serve(v, buf, off); err != nil {
			t.Errorf("page at %d: %v", off, err)
		}
	}
	// All of them are there now: a victim without a server can read them.
	if got := r.do("peek %d", r.at(0)); got != "0" {
		t.Errorf("removed page reads %s", got)
	}
	page := make([]byte, pageSize)
	r.img.fill(page, 8*pageSize)
	if got := r.do("peek %d", r.at(8*pageSize)); got != fmt.Sprint(page[0]) {
		t.Errorf("other page reads %s", got)
	}
}

func TestPagesThatAreThereAreKept(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(4))
	a := r.attach()
	rec := a.Record()
	small := newTestServer(t, Options{ClusterSize: pageSize})
	mustAdd(t, small, "v", a)
	want := r.content()
	// Pages in the middle, at the start and at the end of clusters, in data
	// and in zeros.
	for i, p := range []int64{3, 4, 16, 31, 100, 1000} {
		r.do("poke %d %d", p*pageSize+7, i+1)
		want[p*pageSize+7] = byte(i + 1)
	}
	small.Close()
	a, err := r.reattach(rec)
	if err != nil {
		t.Fatal(err)
	}
	srv := newTestServer(t, Options{})
	mustAdd(t, srv, "v", a)
	r.wantSum(want)
	// A fault that comes twice, by threads or after a restart, changes nothing.
	buf := make([]byte, DefaultClusterSize)
	for off := int64(0); off < r.img.size; off += 5 * pageSize {
		if err := srv.serve(srv.served["v"], buf, off); err != nil {
			t.Fatal(err)
		}
	}
	r.wantSum(want)
}

func TestUnreadablePageKillsInCopyMode(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(4))
	broken := int64(3 << 20)
	reason := errors.New("checksum does not match")
	r.img.fail = func(off, n int64) error {
		if off <= broken && broken < off+n {
			return reason
		}
		return nil
	}
	reports := make(chan error, 4)
	srv := newTestServer(t, Options{OnFatal: func(id string, err error) { reports <- err }})
	mustAdd(t, srv, "v", r.attach())
	want := r.content()
	if got := r.do("peek %d", r.at(broken+pageSize)); got != fmt.Sprint(want[r.at(broken+pageSize)]) {
		t.Errorf("page beside the broken one reads %s", got)
	}
	r.send(fmt.Sprintf("peek %d", r.at(broken)))
	if s, err := r.answer(); err == nil {
		t.Fatalf("the unreadable page was read as %q", s)
	}
	r.wantDead()
	if err := <-reports; !errors.Is(err, reason) {
		t.Errorf("reported %v", err)
	}
	if err := srv.Remove("v"); err != nil {
		t.Error(err)
	}
}

// TestHostilePeerIsKilled: what no VMM of ours does ends the VMM, nothing else.
func TestHostilePeerIsKilled(t *testing.T) {
	needRoot(t)
	const eventUnmap, eventFork = 1 << 6, 1 << 1
	for name, tc := range map[string]struct {
		features int
		do, want string
	}{
		"memory unmapped":     {featureEventRemove | eventUnmap, "unmap 0 8192", "unexpected event"},
		"blocking descriptor": {featureEventRemove, "blocking", "poll events"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newCopyRig(t, newTestImage(4))
			reports := make(chan error, 4)
			srv := newTestServer(t, Options{OnFatal: func(id string, err error) { reports <- err }})
			r.do("uffd %d", tc.features)
			a, err := r.offer(context.Background(), r.handover(), "u")
			if err != nil {
				t.Fatal(err)
			}
			mustAdd(t, srv, "v", a)
			r.send(tc.do)
			_, _ = io.WriteString(r.stdin, "touch 1\n") // it may be dead already
			r.wantDead()
			if err := <-reports; !strings.Contains(err.Error(), tc.want) {
				t.Errorf("reported %v", err)
			}
		})
	}
}

func TestBadHandoversAreRefused(t *testing.T) {
	needRoot(t)
	for name, tc := range map[string]struct {
		body func(good string) string
		fds  string
		want string
	}{
		"no descriptor":       {nil, "", "without a descriptor"},
		"two descriptors":     {nil, "u u", "more than one"},
		"too many":            {nil, "u u u u u u u u u u u u u u u u u u u u u u u u u u", "cut off"},
		"not a userfaultfd":   {nil, "0", "not a userfaultfd"},
		"garbage":             {func(string) string { return "hello]" }, "u", "i/o timeout|hand-over"},
		"object":              {func(string) string { return `{"a":[]}` }, "u", "hand-over"},
		"no regions":          {func(string) string { return "[]" }, "u", "0 regions"},
		"huge pages":          {func(g string) string { return strings.ReplaceAll(g, `"page_size":4096`, `"page_size":2097152`) }, "u", "page_size is 2097152"},
		"part of the image":   {func(g string) string { return strings.Replace(g, `"offset":0`, `"offset":4096`, 1) }, "u", "offset"},
		"negative":            {func(g string) string { return strings.Replace(g, `"offset":0`, `"offset":-4096`, 1) }, "u", "offset"},
		"address not aligned": {func(g string) string { return strings.Replace(g, `,"offset"`, `1,"offset"`, 1) }, "u", "no page of user space"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newCopyRig(t, newTestImage(1))
			r.do("uffd %d", featureEventRemove)
			body := r.handover()
			if tc.body != nil {
				body = tc.body(body)
			}
			before := openFDs(t)
			p, err := OpenPeer(r.pid())
			if err != nil {
				t.Fatal(err)
			}
			m := r.newMap()
			r.do("send %s %x %s", r.socket, body, tc.fds)
			r.do("hangup")
			_, err = p.Accept(context.Background(), r.listener, r.img, m, nil)
			if err == nil || !slices.ContainsFunc(strings.Split(tc.want, "|"), func(w string) bool { return strings.Contains(err.Error(), w) }) {
				t.Errorf("accept gives %v, want %q", err, tc.want)
			}
			m.Close()
			p.Close()
			for fd, what := range openFDs(t) {
				if was, ok := before[fd]; !ok || was != what {
					t.Errorf("descriptor %s, %s, is left open", fd, what)
				}
			}
			if got := r.do("ping"); got != "ok" {
				t.Errorf("victim says %q", got)
			}
		})
	}
}

// openFDs tells what each descriptor of this process is. What a collection
// of garbage closes meanwhile is no matter; what is new is.
func openFDs(t *testing.T) map[string]string {
	t.Helper()
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	fds := map[string]string{}
	for _, e := range entries {
		what, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil { // else it was the one that read the directory
			fds[e.Name()] = what
		}
	}
	return fds
}

func TestVMMThatKeepsNoDescriptorIsRefused(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(1))
	r.do("uffd %d", featureEventRemove)
	p, err := OpenPeer(r.pid())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	m := r.newMap()
	defer m.Close()
	r.do("send %s %x u", r.socket, r.handover())
	r.do("closeuffd")
	if _, err := p.Accept(context.Background(), r.listener, r.img, m, nil); err == nil || !strings.Contains(err.Error(), "keeps no descriptor") {
		t.Errorf("accept gives %v", err)
	}
}

func TestStrangersAreNotHeard(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(1))
	stranger := newCopyRig(t, newTestImage(1))
	for _, v := range []*copyRig{stranger, r} {
		v.do("uffd %d", featureEventRemove)
		v.do("send %s %x u", r.socket, v.handover())
	}
	p, err := OpenPeer(r.pid())
	if err != nil {
		t.Fatal(err)
	}
	var refused []error
	a, err := p.Accept(context.Background(), r.listener, r.img, r.newMap(), func(err error) { refused = append(refused, err) })
	if err != nil {
		t.Fatal(err)
	}
	if len(refused) != 1 || !strings.Contains(refused[0].Error(), fmt.Sprint(stranger.pid())) {
		t.Errorf("refused %v", refused)
	}
	srv := newTestServer(t, Options{})
	mustAdd(t, srv, "v", a)
	r.wantSum(r.content())
	if got := stranger.do("ping"); got != "ok" {
		t.Errorf("stranger says %q", got)
	}
}

func TestWaitForAHandoverEnds(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(1))
	p, err := OpenPeer(r.pid())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	m := r.newMap()
	defer m.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		_, err := p.Accept(ctx, r.listener, r.img, m, nil)
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before a connection: %v", err)
	}
	// And with one that says nothing.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket + "2", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r.do("send %s %x", r.socket+"2", "[")
	ctx, cancel = context.WithCancel(context.Background())
	go func() {
		_, err := p.Accept(ctx, l, r.img, m, nil)
		done <- err
	}()
	time.AfterFunc(20*time.Millisecond, cancel) // whenever: both ways are right
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled with half a message: %v", err)
	}
	r.cmd.Process.Kill()
	r.wantDead()
	if _, err := OpenPeer(r.pid()); !errors.Is(err, ErrGone) {
		t.Errorf("dead process: %v", err)
	}
}

func TestReattachCopyChecksItsRecord(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(4))
	a := r.attach()
	rec := a.Record()
	a.Close()
	for name, bad := range map[string]func(*AttachmentRecord){
		"start time": func(r *AttachmentRecord) { r.StartTime++ },
		"descriptor": func(r *AttachmentRecord) { r.RemoteFD = 0 },
		"regions":    func(r *AttachmentRecord) { r.Regions = nil },
		"overlap":    func(r *AttachmentRecord) { r.Regions = []Region{r.Regions[0], r.Regions[0]} },
		"length":     func(r *AttachmentRecord) { r.Length -= pageSize },
		"pid":        func(r *AttachmentRecord) { r.PID = 0 },
	} {
		c := rec
		c.Regions = slices.Clone(rec.Regions)
		bad(&c)
		if _, err := r.reattach(c); err == nil {
			t.Errorf("attached again with a wrong %s", name)
		}
	}
	a, err := r.reattach(rec)
	if err != nil {
		t.Fatal(err)
	}
	srv := newTestServer(t, Options{})
	mustAdd(t, srv, "v", a)
	r.wantSum(r.content())
	r.cmd.Process.Kill()
	r.wantDead()
	if _, err := r.reattach(rec); !errors.Is(err, ErrGone) {
		t.Errorf("dead process: %v", err)
	}
}

func TestServingInCopyModeAllocatesNothing(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(4))
	srv := newTestServer(t, Options{})
	a := r.attach()
	mustAdd(t, srv, "v", a)
	sv := srv.served["v"]
	buf := make([]byte, DefaultClusterSize)
	off := int64(-DefaultClusterSize)
	for name, next := range map[string]func(){
		"data":  func() { off = (off + DefaultClusterSize) % r.img.zeroFrom },
		"zeros": func() { off = r.img.zeroFrom },
	} {
		if n := testing.AllocsPerRun(15, func() {
			next()
			if err := srv.serve(sv, buf, off); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations per fault", name, n)
		}
	}
}
