package snapshot

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
)

// scattered makes an image of 8 MiB in one build and then changes every so
// many-th page of its first half, in turn by several generations.
func scattered(t *testing.T, s *Store, generations int) *Image {
	t.Helper()
	const size = 8 << 20
	r := rand.New(rand.NewPCG(7, 7))
	page := func() []byte { return bytes.Repeat([]byte{byte(1 + r.IntN(255))}, blockSize) }
	var all []byte
	for range size / blockSize {
		all = append(all, page()...)
	}
	_, img := snap(t, s, size, nil, change{data: all})
	for g := range generations {
		var changes []change
		for b := 2 * g; b < size/blockSize/2; b += 2 * generations {
			changes = append(changes, change{block: int64(b), data: page()})
		}
		_, next := snap(t, s, size, img, changes...)
		must(t, img.Close())
		img = next
	}
	return img
}

func TestClustersInManyPiecesAreBroughtTogether(t *testing.T) {
	f := snaptest.NewFS()
	s := openCompacting(t, f, CompactionPolicy{MaxBuilds: 99})
	img := scattered(t, s, 4)
	want := readImage(t, img)
	none := selection{builds: make([]bool, len(img.Header().Builds))}
	before := none.layout(img.Header())
	plan, err := s.PlanCompaction(img.ID())
	must(t, err)
	if !plan.Needed() || plan.Pieces == 0 || len(plan.Rewrite) != 0 || plan.Blocks > uint64(img.Size())/blockSize/2 {
		t.Fatalf("%+v: half of the clusters are to be copied, and no build as such", plan)
	}
	r, err := s.Compact(bg, img.ID())
	must(t, err)
	must(t, img.Close())
	img, err = s.OpenImage(r.To)
	must(t, err)
	defer img.Close()
	if !bytes.Equal(readImage(t, img), want) {
		t.Fatal("the compacted image reads differently")
	}
	none.builds = make([]bool, len(img.Header().Builds))
	after := none.layout(img.Header())
	if after.pieces != after.clusters || after.clusters != before.clusters || before.pieces < 4*after.clusters {
		t.Fatalf("before %+v, after %+v: want one piece for each cluster", before, after)
	}
	if again, err := s.PlanCompaction(r.To); err != nil || again.Needed() {
		t.Fatalf("it is to be compacted again: %+v, %v", again, err)
	}
	problems, err := s.Verify(bg, nil)
	must(t, err)
	if len(problems) != 0 {
		t.Fatal(problems)
	}
}

// A plan foretells exactly what the image is made of afterwards, and the parts
// cover what the mappings do, in their order, each block once.
func TestSelectionForetellsTheLayout(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 1))
	for round := range 300 {
		f := snaptest.NewFS()
		s := openStore(t, f)
		const blocks = 150
		var img *Image
		for range 1 + r.IntN(4) {
			var changes []change
			for at := r.IntN(20); at < blocks; at += 1 + r.IntN(30) {
				n := min(1+r.IntN(40)*r.IntN(2), blocks-at)
				changes = append(changes, change{block: int64(at), data: bytes.Repeat([]byte{byte(1 + r.IntN(255))}, n*blockSize)})
				at += n
			}
			_, next := snap(t, s, blocks*blockSize, img, changes...)
			if img != nil {
				must(t, img.Close())
			}
			img = next
		}
		h := img.Header()
		sel := selection{builds: make([]bool, len(h.Builds)), pieces: r.IntN(4)}
		for i := range sel.builds {
			sel.builds[i] = r.IntN(3) == 0
		}
		checkParts(t, h, sel)
		foretold := sel.layout(h)
		w := &Writer{store: s, id: format.NewID(), size: h.Size, base: h, relayout: true, seen: make([]uint64, blocks/64+1)}
		s.pending[w.id] = w
		must(t, w.create())
		c := &compactionFile{Pieces: sel.pieces}
		for i, b := range h.Builds {
			if sel.builds[i] {
				c.Rewrite = append(c.Rewrite, b.ID)
			}
		}
		must(t, copySelected(bg, img, w, c))
		_, err := w.Finish(bg)
		must(t, err)
		got, err := s.OpenImage(w.id)
		must(t, err)
		if !bytes.Equal(readImage(t, got), readImage(t, img)) {
			t.Fatalf("round %d: the content differs", round)
		}
		now := selection{builds: make([]bool, len(got.Header().Builds))}.layout(got.Header())
		now.copied = foretold.copied
		if now != foretold || now.fragments != got.Header().Mappings.Len() || int64(foretold.copied)*blockSize != w.BytesWritten() {
			t.Fatalf("round %d: foretold %+v, there is %+v, %d mappings, %d bytes copied", round, foretold, now, got.Header().Mappings.Len(), w.BytesWritten())
		}
		must(t, got.Close())
		must(t, img.Close())
		must(t, w.Abort())
	}
}

func checkParts(t *testing.T, h *format.Header, sel selection) {
	t.Helper()
	var end uint64
	for m := range sel.parts(h) {
		for b := m.Start; b < m.End(); b++ {
			if got, kind, _ := h.Lookup(b); b < end || kind != format.Data || got.Build != m.Build || got.Offset+b-got.Start != m.Offset+b-m.Start {
				t.Fatalf("block %d of part %+v is %v of %+v", b, m, kind, got)
			}
		}
		end = m.End()
	}
	n := uint64(0)
	for m := range sel.parts(h) {
		n += m.Length
	}
	for _, m := range h.Mappings.All() {
		n -= m.Length
	}
	if n != 0 {
		t.Fatalf("the parts have %d blocks more than the mappings", int64(n))
	}
}

func TestCompactionVersionsStayReadable(t *testing.T) {
	from, to := format.NewID(), format.NewID()
	for _, c := range []compactionFile{
		{Version: 1, From: from, To: to, Rewrite: []format.ID{from}},
		{Version: 2, From: from, To: to, Pieces: 3},
	} {
		b, err := encodeCompaction(&c)
		must(t, err)
		if _, err := decodeCompaction(b); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for _, c := range []compactionFile{
		{Version: 1, From: from, To: to, Pieces: 3},
		{Version: 2, From: from, To: to, Pieces: -1},
		{Version: 2, From: from, To: to, Pieces: 17},
		{Version: 3, From: from, To: to},
	} {
		b, err := encodeCompaction(&c)
		must(t, err)
		if _, err := decodeCompaction(b); err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
}
