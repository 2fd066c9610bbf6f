package pager

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

const cluster = uffd.DefaultClusterSize

// over ends the start of a sandbox, as the window's timer does.
func (r *rig) over(id string) {
	r.t.Helper()
	g := r.srv.guests[id]
	g.mu.Lock()
	defer g.mu.Unlock()
	r.srv.learn(id, g.memory)
}

func (r *rig) order() []uint32 {
	r.t.Helper()
	o, err := r.srv.orders.load(r.image, format.ID{}, cluster)
	must(r.t, err)
	return o
}

func (r *rig) peek(v *vmmProc, clusters ...int) {
	r.t.Helper()
	for _, c := range clusters {
		if got := v.do("peek %d", c*cluster); got != fmt.Sprint(r.content[c*cluster]) {
			r.t.Errorf("cluster %d reads %s", c, got)
		}
	}
}

// prefetched is the pager's count over all starts.
func (r *rig) prefetched() *pagerv1.Prefetch {
	r.t.Helper()
	status, err := call(r.srv.GetStatus, &pagerv1.GetStatusRequest{})
	must(r.t, err)
	return status.Totals.Prefetch
}

func TestColdStartsAreReadAhead(t *testing.T) {
	r := newRig(t, 4)
	v := r.shared("a")
	r.peek(v, 30, 2, 40)
	r.over("a")
	r.peek(v, 9) // later than its start
	v.kill()
	r.release("a")
	first := r.order()
	if !slices.Equal(first, []uint32{30, 2, 40}) {
		t.Fatalf("recorded %v", first)
	}
	// The next cold start takes no fault for them, and needs another one.
	v = r.shared("b")
	<-r.srv.guests["b"].memory.image.ahead.done
	r.peek(v, 30, 40, 20)
	if st := r.stats("b"); st.BytesFilled != cluster || st.Prefetch != nil {
		t.Errorf("%v", st)
	}
	r.over("b")
	st := r.stats("b").Prefetch
	// Precision and recall are two of three: 2 was wasted, 20 missed.
	want := &pagerv1.Prefetch{ReadBytes: 3 * cluster, UsedBytes: 2 * cluster, WastedBytes: cluster, MissedBytes: cluster}
	if !proto.Equal(st, want) {
		t.Errorf("prefetch: %v, want %v", st, want)
	}
	if got := r.prefetched(); !proto.Equal(got, want) {
		t.Errorf("totals: %v, want %v", got, want)
	}
	next := r.order()
	if !slices.Equal(next, []uint32{30, 40, 20}) {
		t.Errorf("next order is %v", next)
	}
	// A second clone says nothing about cold starts.
	w := r.shared("c")
	r.peek(w, 5)
	r.over("c")
	if !slices.Equal(r.order(), next) {
		t.Errorf("order became %v", r.order())
	}
	// The third cold start needs what was read for it, and is added.
	for id, v := range map[string]*vmmProc{"b": v, "c": w} {
		v.kill()
		r.release(id)
	}
	v = r.shared("d")
	<-r.srv.guests["d"].memory.image.ahead.done
	r.peek(v, 30, 40, 20)
	r.over("d")
	want = &pagerv1.Prefetch{ReadBytes: 6 * cluster, UsedBytes: 5 * cluster, WastedBytes: cluster, MissedBytes: cluster}
	if got := r.prefetched(); !proto.Equal(got, want) {
		t.Errorf("totals: %v, want %v", got, want)
	}
	_, err := call(r.srv.DropImage, &pagerv1.DropImageRequest{ImageId: r.image.String()})
	must(t, err)
	if _, err := os.Stat(r.srv.orders.path(r.image)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("order of a dropped image: %v", err)
	}
}

// A pause passes the order on, so that the older image may go with its own.
func TestAPausePassesTheOrderOn(t *testing.T) {
	r := newRig(t, 64)
	v := r.shared("a")
	r.peek(v, 7, 3)
	v.kill()
	successor := format.ID{9}
	_, err := call(r.srv.ReleaseMemory, &pagerv1.ReleaseMemoryRequest{SandboxId: "a", SuccessorImageId: successor.String()})
	must(t, err)
	_, err = call(r.srv.DropImage, &pagerv1.DropImageRequest{ImageId: r.image.String()})
	must(t, err)
	got, err := r.srv.orders.load(successor, r.image, cluster)
	if err != nil || !slices.Equal(got, []uint32{7, 3}) {
		t.Errorf("the successor's order is %v, %v", got, err)
	}
	_, err = call(r.srv.ReleaseMemory, &pagerv1.ReleaseMemoryRequest{SandboxId: "a", SuccessorImageId: "?"})
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a successor that is no ID: %v", err)
	}
	// So does a compaction, which makes another image of the same content.
	compacted := format.ID{10}
	_, err = call(r.srv.DropImage, &pagerv1.DropImageRequest{ImageId: successor.String(), SuccessorImageId: compacted.String()})
	must(t, err)
	got, err = r.srv.orders.load(compacted, format.ID{}, cluster)
	if err != nil || !slices.Equal(got, []uint32{7, 3}) {
		t.Errorf("the order of a compacted image is %v, %v", got, err)
	}
	if got, err := r.srv.orders.load(successor, format.ID{}, cluster); err != nil || got != nil {
		t.Errorf("the order of a dropped image is %v, %v", got, err)
	}
	_, err = call(r.srv.DropImage, &pagerv1.DropImageRequest{ImageId: compacted.String(), SuccessorImageId: "?"})
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a successor that is no ID: %v", err)
	}
}

func TestDamagedOrderIsAsIfLost(t *testing.T) {
	r := newRig(t, 2)
	must(t, r.srv.orders.save(uffd.Order{Image: r.image, ClusterSize: cluster, Clusters: []uint32{1, 2}}))
	path := r.srv.orders.path(r.image)
	good, err := os.ReadFile(path)
	must(t, err)
	beyond := uffd.Order{Image: r.image, ClusterSize: cluster, Clusters: []uint32{1, 1 << 30}}.Encode()
	other := uffd.Order{Image: format.ID{1}, ClusterSize: cluster, Clusters: []uint32{1}}.Encode()
	for i, b := range [][]byte{good[:20], nil, append([]byte{0}, good[1:]...), beyond, other} {
		must(t, os.WriteFile(path, b, 0o600))
		id := fmt.Sprintf("s%d", i)
		v := r.shared(id)
		v.wantSum(r.content)
		v.kill()
		r.release(id)
	}
}

func TestReleaseWithinTheWindow(t *testing.T) {
	r := newRig(t, 2)
	v := r.shared("a")
	r.peek(v, 3)
	v.kill()
	r.release("a") // the first start: what it touched is all there is
	if got := r.order(); !slices.Equal(got, []uint32{3}) {
		t.Errorf("recorded %v", got)
	}
	v = r.shared("b")
	r.peek(v, 5)
	v.kill()
	r.release("b") // what it used of it cannot be told any more
	if got := r.order(); !slices.Equal(got, []uint32{3, 5}) {
		t.Errorf("order became %v", got)
	}
	if got := r.prefetched(); !proto.Equal(got, &pagerv1.Prefetch{}) {
		t.Errorf("a start that cannot be judged was: %v", got)
	}
}

func TestOrdersAreBounded(t *testing.T) {
	o := orders{t.TempDir()}
	for i := range maxOrders + 3 {
		id := format.ID{byte(i), byte(i >> 8), 1}
		must(t, o.save(uffd.Order{Image: id, ClusterSize: cluster}))
		at := time.Unix(int64(1000+i), 0)
		must(t, os.Chtimes(o.path(id), at, at))
	}
	must(t, o.prune())
	names, err := filepath.Glob(filepath.Join(o.dir, "*"))
	if err != nil || len(names) != maxOrders {
		t.Errorf("%d orders are kept, %v", len(names), err)
	}
	if got, err := o.load(format.ID{0, 0, 1}, format.ID{}, cluster); got != nil || err != nil {
		t.Errorf("the oldest is still there: %v, %v", got, err)
	}
	// The order of the parent serves a new generation.
	parent := format.ID{9, 9}
	must(t, o.save(uffd.Order{Image: parent, ClusterSize: cluster, Clusters: []uint32{7}}))
	if got, err := o.load(format.ID{8}, parent, cluster); err != nil || !slices.Equal(got, []uint32{7}) {
		t.Errorf("order of the parent: %v, %v", got, err)
	}
	none := orders{}
	if err := errors.Join(none.save(uffd.Order{}), none.remove(parent)); err != nil {
		t.Error(err)
	}
}

func TestEvictionTakesUnusedImagesFirst(t *testing.T) {
	r := newRig(t, 4)
	warm := func(id string) {
		_, err := call(r.srv.PrepareMemory, &pagerv1.PrepareMemoryRequest{SandboxId: id, ImageId: r.image.String(), KeepWarm: true})
		must(t, err)
		v := r.shared(id)
		v.wantSum(r.content)
		v.kill()
		r.release(id)
	}
	first, _ := r.image, r.content
	warm("w")
	r.image, r.content = r.newImage(4, 7)
	v := r.shared("v")
	v.do("poke 0 99")
	want := slices.Clone(r.content)
	want[0] = 99
	v.wantSum(want)
	evict := func(n int64) int64 {
		t.Helper()
		e, err := call(r.srv.EvictMemory, &pagerv1.EvictMemoryRequest{Bytes: n})
		must(t, err)
		return e.EvictedBytes
	}
	if n := evict(1); n != 3<<20 || r.srv.images.byID[first] != nil {
		t.Errorf("evicted %d bytes; unused image is open: %v", n, r.srv.images.byID[first] != nil)
	}
	if st := r.stats("v"); st.SharedResidentBytes != 3<<20 {
		t.Errorf("image in use has %d bytes", st.SharedResidentBytes)
	}
	if n := evict(1 << 20); n < 1<<20 || n > 1<<20+cluster {
		t.Errorf("evicted %d bytes of an image in use", n)
	}
	v.wantSum(want)
	if n := evict(1 << 40); n != 3<<20 {
		t.Errorf("evicted %d bytes at most", n)
	}
	v.wantSum(want)
	for _, n := range []int64{0, -1} {
		_, err := call(r.srv.EvictMemory, &pagerv1.EvictMemoryRequest{Bytes: n})
		wantCode(t, err, connect.CodeInvalidArgument, "bytes")
	}
	// By itself, below the mark of 1 MiB.
	r.free = 1 << 20
	must(t, r.srv.relieve())
	if st := r.stats("v"); st.SharedResidentBytes != 3<<20 {
		t.Errorf("evicted with enough memory: %v", st)
	}
	r.free = 0
	must(t, r.srv.relieve())
	if st := r.stats("v"); st.SharedResidentBytes > 1<<20 {
		t.Errorf("%d bytes stay without memory", st.SharedResidentBytes)
	}
	v.wantSum(want)
	if n, err := memAvailable(); n <= 0 || err != nil {
		t.Errorf("the host has %d bytes, %v", n, err)
	}
}
