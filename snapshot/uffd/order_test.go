//go:build linux && amd64

package uffd

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"
)

func TestOrderSurvivesNoChange(t *testing.T) {
	o := Order{ClusterSize: DefaultClusterSize, Clusters: []uint32{5, 0, 1 << 31, 7}}
	o.Image[3] = 9
	b := o.Encode()
	got, err := DecodeOrder(b)
	if err != nil || got.Image != o.Image || got.ClusterSize != o.ClusterSize || !slices.Equal(got.Clusters, o.Clusters) {
		t.Fatalf("%+v, %v", got, err)
	}
	for i := range b {
		if _, err := DecodeOrder(b[:i]); err == nil {
			t.Errorf("decoded %d of %d bytes", i, len(b))
		}
		for bit := range 8 {
			c := bytes.Clone(b)
			c[i] ^= 1 << bit
			if _, err := DecodeOrder(c); err == nil {
				t.Errorf("decoded with bit %d of byte %d flipped", bit, i)
			}
		}
	}
	if o, err := DecodeOrder(Order{Clusters: make([]uint32, MaxOrder+5)}.Encode()); err != nil || len(o.Clusters) != MaxOrder {
		t.Errorf("%d clusters of too many, %v", len(o.Clusters), err)
	}
}

func FuzzDecodeOrder(f *testing.F) {
	f.Add(Order{ClusterSize: 65536, Clusters: []uint32{1, 2, 3}}.Encode())
	f.Add(Order{}.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if o, err := DecodeOrder(b); err == nil && !bytes.Equal(o.Encode(), b) {
			t.Fatalf("decoded %+v, which encodes otherwise", o)
		}
	})
}

func TestUsedTellsWhatAVMTookOfThePrefetched(t *testing.T) {
	needRoot(t)
	img := newTestImage(4)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	if _, err := srv.Prefetch(context.Background(), shared, []uint32{1, 2, 3, 4, 5}); err != nil {
		t.Fatal(err)
	}
	v := startVictim(t, shared, victimOptions{})
	mustAdd(t, srv, "v", mustInject(t, v, shared, -1))
	for _, off := range []int64{2 * DefaultClusterSize, 4*DefaultClusterSize + 9*pageSize, 7 * DefaultClusterSize} {
		v.do("peek %d", off)
	}
	used, err := srv.Used("v", []uint32{5, 4, 3, 2, 1, 7, 8})
	// 1 and 5 are neighbours, see Used.
	used = slices.DeleteFunc(used, func(c uint32) bool { return c == 1 || c == 5 })
	if err != nil || !slices.Equal(used, []uint32{4, 2, 7}) {
		t.Errorf("used %v, %v", used, err)
	}
	if touched, _ := srv.Touched("v"); !slices.Equal(touched, []uint32{7}) {
		t.Errorf("touched %v", touched)
	}
	if _, err := srv.Used("v", []uint32{1 << 20}); err == nil {
		t.Error("used a cluster beyond the image")
	}
	if _, err := srv.Used("x", nil); err == nil {
		t.Error("used by nobody")
	}
}

func TestEvictedPagesComeBack(t *testing.T) {
	needRoot(t)
	img := newTestImage(8)
	shared := newTestShared(t, img)
	srv := newTestServer(t, Options{})
	vs := []*victimProc{startVictim(t, shared, victimOptions{}), startVictim(t, shared, victimOptions{})}
	for i, v := range vs {
		mustAdd(t, srv, fmt.Sprint(i), mustInject(t, v, shared, -1))
	}
	want := img.content()
	changed := slices.Clone(want)
	vs[0].do("poke 70000 9")
	changed[70000] = 9
	vs[0].wantSum(changed)
	all := shared.Resident()
	for _, n := range []int64{1, 1 << 20, all / 2, all, 10 * all} {
		before := shared.Resident()
		gone, err := shared.Evict(n)
		if err != nil || gone < min(n, before) || gone > n+DefaultClusterSize || shared.Resident() != before-gone {
			t.Errorf("evicted %d of %d wanted, %v; %d bytes were there, %d are", gone, n, err, before, shared.Resident())
		}
		vs[0].wantSum(changed)
		vs[1].wantSum(want)
	}
	// While they run.
	vs[1].send("touch 4")
	for range 40 {
		if _, err := shared.Evict(512 << 10); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := vs[1].answer(); s != "ok" {
		t.Fatalf("victim says %q, %v", s, err)
	}
	vs[0].wantSum(changed)
	vs[1].wantSum(want)
}
