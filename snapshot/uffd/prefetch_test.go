//go:build linux && amd64

package uffd

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// clustersOf are all clusters of an image.
func clustersOf(img *testImage) (all []uint32) {
	for c := range uint32(img.size / DefaultClusterSize) {
		all = append(all, c)
	}
	return all
}

func TestPrefetchIntoCopiedMemory(t *testing.T) {
	needRoot(t)
	for name, mix := range map[string]func([]uint32){
		"in order": func([]uint32) {}, "reversed": slices.Reverse[[]uint32],
		"halves": func(c []uint32) { slices.SortFunc(c, func(a, b uint32) int { return int(a*37%64) - int(b*37%64) }) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newCopyRig(t, newTestImage(4))
			srv := newTestServer(t, Options{})
			mustAdd(t, srv, "v", r.attach())
			want := r.content()
			r.do("poke %d 7", r.at(3*pageSize))
			want[r.at(3*pageSize)] = 7
			r.do("remove %d %d", r.at(100*pageSize), 5*pageSize)
			clear(want[r.at(100*pageSize) : r.at(100*pageSize)+5*pageSize])
			all := clustersOf(r.img)
			mix(all)
			if n, err := srv.PrefetchCopy(t.Context(), "v", all); err != nil || n == 0 {
				t.Fatalf("put %d bytes ahead, %v", n, err)
			}
			r.wantSum(want)
			// No fault for data after the first one.
			if touched, err := srv.Touched("v"); err != nil || !slices.Equal(touched, []uint32{0}) {
				t.Errorf("touched %v, %v", touched, err)
			}
		})
	}
}

func TestPrefetchIntoNothingIsRefused(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(4))
	shared := newTestShared(t, r.img)
	srv := newTestServer(t, Options{})
	mustAdd(t, srv, "v", r.attach())
	mustAdd(t, srv, "s", mustInject(t, startVictim(t, shared, victimOptions{}), shared, -1))
	for _, tc := range []struct {
		id       string
		clusters []uint32
		want     string
	}{
		{"w", []uint32{1}, "no attachment"}, {"s", []uint32{1}, "shares an image"},
		{"v", []uint32{1, 64}, "beyond"}, {"v", []uint32{1<<32 - 1}, "beyond"},
	} {
		n, err := srv.PrefetchCopy(t.Context(), tc.id, tc.clusters)
		if n != 0 || err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: put %d bytes of %v, %v, want %q", tc.id, n, tc.clusters, err, tc.want)
		}
	}
	r.wantSum(r.content())
}

// TestPrefetchReadsAdjoiningClustersTogether, up to 256 KiB, and none that was
// faulted on or is named twice.
func TestPrefetchReadsAdjoiningClustersTogether(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(8))
	srv := newTestServer(t, Options{})
	mustAdd(t, srv, "v", r.attach())
	if err := srv.serve(srv.served["v"], make([]byte, DefaultClusterSize), 9*DefaultClusterSize); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		clusters []uint32
		reads    int64
	}{
		// Of 16 pages two are zeros, so a run of n clusters has n+1 of data.
		{[]uint32{0}, 2},
		{[]uint32{2, 3, 4, 5}, 5},
		{[]uint32{20, 30, 21, 31, 22}, 4 + 3},
		{[]uint32{10, 8, 9, 9, 10}, 2 + 2},
		{[]uint32{0, 2, 3, 4, 5, 9}, 5 + 2}, // the image is read, nothing is put
		{[]uint32{32, 33}, 0},               // zeros
		{[]uint32{70, 71, 72, 73, 74, 75}, 5 + 3},
	} {
		before := r.img.reads.Load()
		if _, err := srv.PrefetchCopy(t.Context(), "v", tc.clusters); err != nil {
			t.Fatal(err)
		}
		if n := r.img.reads.Load() - before; n != tc.reads {
			t.Errorf("%v: %d reads, want %d", tc.clusters, n, tc.reads)
		}
	}
	r.wantSum(r.content())
}

// TestPrefetchBesideReadsWritesAndRemovals: what was removed stays zeros.
func TestPrefetchBesideReadsWritesAndRemovals(t *testing.T) {
	needRoot(t)
	for round := range 4 {
		r := newCopyRig(t, newTestImage(8))
		r.img.delay = time.Duration(round) * 100 * time.Microsecond
		srv := newTestServer(t, Options{OnFatal: func(id string, err error) { t.Errorf("fatal %s: %v", id, err) }})
		mustAdd(t, srv, "v", r.attach())
		all := clustersOf(r.img)
		if round%2 == 0 {
			slices.Reverse(all)
		}
		r.send(fmt.Sprintf("churn 4 1000 %d %d", round, r.rotation))
		if _, err := srv.PrefetchCopy(t.Context(), "v", all); err != nil {
			t.Error(err)
		}
		if s, err := r.answer(); s != "ok" {
			t.Fatalf("victim says %q, %v", s, err)
		}
	}
}

func TestPrefetchAllocatesNothingForACluster(t *testing.T) {
	needRoot(t)
	r := newCopyRig(t, newTestImage(16))
	srv := newTestServer(t, Options{})
	mustAdd(t, srv, "v", r.attach())
	allocs := func(clusters []uint32, n int) float64 {
		return testing.AllocsPerRun(7, func() {
			if _, err := srv.PrefetchCopy(t.Context(), "v", clusters[:n]); err != nil {
				t.Fatal(err)
			}
			clusters = clusters[n:]
		})
	}
	all := clustersOf(r.img)
	// Others in this process allocate now and then, too.
	if one, many := allocs(all, 1), allocs(all[128:], 16); many >= one+8 {
		t.Errorf("%v allocations for 16 clusters, %v for one", many, one)
	}
}
