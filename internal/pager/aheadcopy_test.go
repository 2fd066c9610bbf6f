package pager

import (
	"fmt"
	"slices"
	"testing"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// ahead waits until what is to be put into the memory of a sandbox by now lies
// there.
func (r *rig) ahead(id string) {
	r.t.Helper()
	g := r.srv.guests[id]
	g.mu.Lock()
	m := g.memory
	g.mu.Unlock()
	if m.handover.done != nil { // another pager took it
		<-m.handover.done
	}
	m.putting.Wait()
}

// runs says that a sandbox runs.
func (r *rig) runs(id string) {
	r.t.Helper()
	_, err := call(r.srv.ReadAhead, &pagerv1.ReadAheadRequest{SandboxId: id})
	must(r.t, err)
}

// needs has starts of the image need these clusters.
func (r *rig) needs(clusters ...uint32) {
	r.t.Helper()
	must(r.t, r.srv.orders.save(uffd.Order{Image: r.image, ClusterSize: cluster, Clusters: clusters}))
}

// wantMissed compares how many clusters were faulted on.
func (r *rig) wantMissed(id, when string, clusters int) {
	r.t.Helper()
	touched, err := r.srv.faults.Touched(id)
	must(r.t, err)
	if len(touched) != clusters {
		r.t.Errorf("%s: faults on the clusters %v, want %d", when, touched, clusters)
	}
}

// scattered are n clusters of data of an image of 4 MiB, none next to another.
func scattered(n int) (order []uint32) {
	for i := range n {
		order = append(order, uint32(i*13%48))
	}
	return order
}

func ints(clusters []uint32) (out []int) {
	for _, c := range clusters {
		out = append(out, int(c))
	}
	return out
}

// TestCopiedMemoryIsPutAhead: what one start needed lies in the memory of the
// next one before that faults on it; what that misses is added.
func TestCopiedMemoryIsPutAhead(t *testing.T) {
	r := newRig(t, 4)
	v := r.copied("a")
	r.peek(v, 30, 2)
	r.over("a")
	v.kill()
	r.release("a")
	if got := r.order(); !slices.Equal(got, []uint32{30, 2}) {
		t.Fatalf("recorded %v", got)
	}
	for n, want := range [][]uint32{{30, 2, 20}, {30, 2, 20}} {
		id := fmt.Sprintf("b%d", n)
		v = r.copied(id)
		r.ahead(id)
		r.peek(v, 2, 30)
		r.wantMissed(id, "on what was put ahead", 0)
		r.peek(v, 20)
		r.over(id)
		if got := r.order(); !slices.Equal(got, want) {
			t.Errorf("after start %d the order is %v, want %v", n, got, want)
		}
		v.kill()
		r.release(id)
	}
}

// TestOnlyTheFrontIsPutAheadBeforeTheVMRuns, and the rest when that is said.
func TestOnlyTheFrontIsPutAheadBeforeTheVMRuns(t *testing.T) {
	r := newRig(t, 4)
	order := scattered(40)
	r.needs(order...)
	v := r.copied("a")
	r.ahead("a")
	r.peek(v, ints(order[:firstAhead])...)
	r.wantMissed("a", "on the front", 0)
	r.peek(v, ints(order[firstAhead:firstAhead+3])...)
	r.wantMissed("a", "behind it", 3)
	for range 2 {
		r.runs("a")
		r.ahead("a")
		r.peek(v, ints(order)...)
		r.wantMissed("a", "when it runs", 3)
	}
	v.wantSum(r.content)
}

// TestTheCallMayComeBeforeTheHandover: a load need not touch memory.
func TestTheCallMayComeBeforeTheHandover(t *testing.T) {
	r := newRig(t, 4)
	order := scattered(40)
	r.needs(order...)
	v := startVMM(t)
	r.prepareCopy("a")
	r.runs("a")
	r.expect("a", v)
	r.runs("a")
	v.do("handover %s %d 0", r.socket("a"), len(r.content))
	r.ahead("a")
	r.peek(v, ints(order)...)
	r.wantMissed("a", "on all of it", 0)
}

func TestReadAheadOfOthers(t *testing.T) {
	r := newRig(t, 4)
	for _, id := range []string{"a", "", "../a"} {
		_, err := call(r.srv.ReadAhead, &pagerv1.ReadAheadRequest{SandboxId: id})
		wantCode(t, err, connect.CodeNotFound, "not served")
	}
	r.serveDisk("d")
	v := r.shared("s")
	for _, id := range []string{"d", "s"} {
		r.runs(id)
	}
	v.wantSum(r.content)
	if n := len(r.srv.guests); n != 2 {
		t.Errorf("%d sandboxes are served, want 2", n)
	}
	_, err := call(r.srv.StopDisk, &pagerv1.StopDiskRequest{SandboxId: "d"})
	must(t, err)
}

// TestMemoryIsReleasedWhileItIsReadAhead: nothing of it stays, and the next start
// is served.
func TestMemoryIsReleasedWhileItIsReadAhead(t *testing.T) {
	r := newRig(t, 4)
	r.needs(scattered(48)...)
	for n := range 8 {
		id := fmt.Sprintf("s%d", n)
		v := r.copied(id)
		if n%2 == 0 {
			r.peek(v, 47) // the hand-over has been noted
		}
		r.runs(id)
		v.kill()
		r.release(id)
		_, err := call(r.srv.ReadAhead, &pagerv1.ReadAheadRequest{SandboxId: id})
		wantCode(t, err, connect.CodeNotFound, id)
	}
	if n := len(r.srv.images.byID); n != 0 {
		t.Errorf("%d images are open", n)
	}
	if f := r.files(); len(f) != 0 {
		t.Errorf("left behind: %v", f)
	}
	r.copied("a").wantSum(r.content)
}

// TestTheNextPagerGoesOnReadingAhead, of the front, too, which the one before may
// not have put in; what was removed since stays zeros.
func TestTheNextPagerGoesOnReadingAhead(t *testing.T) {
	r := newRig(t, 4)
	order := scattered(40)
	r.needs(order...)
	v := r.copied("a")
	r.ahead("a")
	want := slices.Clone(r.content)
	v.do("poke %d 7", order[0]*cluster)
	v.do("remove %d %d", order[1]*cluster, cluster)
	v.do("remove %d %d", order[20]*cluster, cluster)
	want[order[0]*cluster] = 7
	clear(want[order[1]*cluster : (order[1]+1)*cluster])
	clear(want[order[20]*cluster : (order[20]+1)*cluster])
	r.restart()
	r.runs("a")
	r.ahead("a")
	there := slices.DeleteFunc(ints(order), func(c int) bool {
		return c == int(order[0]) || c == int(order[1]) || c == int(order[20])
	})
	r.peek(v, there...)
	r.wantMissed("a", "after the restart", 0)
	v.wantSum(want)
	r.restart() // and one that ends in the middle of it
	r.runs("a")
	r.restart()
	v.wantSum(want)
	v.kill()
	r.release("a")
	if got := r.order(); !slices.Equal(got, order) {
		t.Errorf("the order became %v", got)
	}
}

// TestWhatLoadingNeedsStaysInFront, where it raises no fault any more, whatever
// the starts need behind it.
func TestWhatLoadingNeedsStaysInFront(t *testing.T) {
	r := newRig(t, 4)
	all := scattered(48)
	loading, later := all[:firstAhead], all[firstAhead:]
	for n := range 4 {
		id := fmt.Sprintf("s%d", n)
		v := r.copied(id)
		r.ahead(id)
		r.peek(v, ints(loading)...)
		if n > 0 {
			r.wantMissed(id, "of loading", 0)
		}
		r.runs(id)
		r.ahead(id)
		mine := later[n*8 : n*8+8]
		r.peek(v, ints(mine)...)
		v.kill()
		r.release(id)
		if got, want := r.order(), all[:firstAhead+n*8+8]; !slices.Equal(got, want) {
			t.Errorf("after start %d the order is %v, want %v", n, got, want)
		}
	}
}

// TestAnOrderOfCopyModeIsBounded: one that would grow too long begins anew,
// behind what loading needs.
func TestAnOrderOfCopyModeIsBounded(t *testing.T) {
	r := newRig(t, 1)
	long := make([]uint32, maxCopied)
	for i := range long {
		long[i] = uint32(i)
	}
	m := &memory{image: &image{id: r.image}, order: long}
	must(t, r.srv.learnCopy(m, []uint32{3, 5000, 9}))
	if got, want := r.order(), append(slices.Clone(long[:firstAhead]), 5000); !slices.Equal(got, want) {
		t.Errorf("it is %d long and begins with %v", len(got), got[:min(len(got), firstAhead+2)])
	}
	m.order = nil
	must(t, r.srv.learnCopy(m, append(slices.Clone(long), 7000)))
	if got := r.order(); !slices.Equal(got, long) {
		t.Errorf("it is %d long", len(got))
	}
	m.order = long[:firstAhead]
	var others []uint32
	for i := range uint32(maxCopied) {
		others = append(others, 2000+i)
	}
	must(t, r.srv.learnCopy(m, others))
	if got := r.order(); len(got) != maxCopied || !slices.Equal(got[:firstAhead], long[:firstAhead]) || got[firstAhead] != 2000 {
		t.Errorf("it is %d long and begins with %v", len(got), got[:firstAhead+2])
	}
	// What was recorded of another driver is longer than what is put ahead.
	r.needs(append(slices.Clone(long), others...)...)
	if got, err := r.srv.orders.load(r.image, format.ID{}, cluster); err != nil || len(got) != 2*maxCopied {
		t.Fatalf("%d clusters are stored, %v", len(got), err)
	}
	r.prepareCopy("a")
	if n := len(r.srv.guests["a"].memory.order); n != maxCopied {
		t.Errorf("%d are to be put ahead", n)
	}
}
