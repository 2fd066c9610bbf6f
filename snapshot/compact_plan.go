package snapshot

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// CompactionPolicy bounds what an image is made of. The zero value of a field
// is its default.
type CompactionPolicy struct {
	// MaxBuilds is how many builds an image may read from; default 32.
	MaxBuilds int
	// MaxFragments is how many mappings an image may have; default 65,536. An
	// image with more runs of data than half of that may have two for each.
	MaxFragments int
	// MaxPieces is in how many pieces of storage the 64 KiB that one page fault
	// reads may lie, on average over the image; default 1.5. Each costs a call to
	// the kernel; less costs more copying: 3.5 blocks for each that pauses wrote,
	// where 2 pieces cost 2.3. An image of less than 256 pieces in all is left as it is.
	MaxPieces float64

	few int // pieces that MaxPieces does not look at; 0: fewPieces
}

const fewPieces = 256

func (p CompactionPolicy) withDefaults() CompactionPolicy {
	if p.MaxBuilds <= 0 {
		p.MaxBuilds = 32
	}
	if p.MaxFragments <= 0 {
		p.MaxFragments = 1 << 16
	}
	if p.MaxPieces < 1 {
		p.MaxPieces = 1.5
	}
	if p.few == 0 {
		p.few = fewPieces
	}
	return p
}

// CompactionPlan says what compaction would do to an image.
type CompactionPlan struct {
	Image     format.ID
	Builds    int // that the image reads from now
	Fragments int // mappings that it has now
	// Urgent: it reads from more than twice the builds that it may. Who makes
	// images faster than they are compacted waits for Compact then.
	Urgent bool
	// Rewrite lists the builds whose blocks would be copied into a new one.
	Rewrite []format.ID
	// Pieces is for clusters of 64 KiB: those in more pieces would be copied,
	// too. 0: none.
	Pieces          int
	Blocks          uint64 // that would be copied; 0: the image is inside of its bounds
	BuildsAfter     int
	FragmentsAfter  int
	fragmentsNeeded int // of an image in one build
}

// Needed reports whether there is something to do.
func (p *CompactionPlan) Needed() bool { return p.Blocks > 0 }

// PlanCompaction tells what the store's policy wants done to an image. It
// changes nothing.
func (s *Store) PlanCompaction(id format.ID) (CompactionPlan, error) {
	h, _, err := s.readHeader(id)
	if err != nil {
		return CompactionPlan{}, fmt.Errorf("plan compaction of image %s: %w", id, err)
	}
	return planCompaction(h, s.compaction), nil
}

// usage of a build by one image.
type buildUse struct {
	index     uint32
	live      uint64 // blocks that the image shows
	fragments int
}

func planCompaction(h *format.Header, policy CompactionPolicy) CompactionPlan {
	p := CompactionPlan{Image: h.Build, Builds: len(h.Builds)}
	use := make([]buildUse, len(h.Builds))
	for i := range use {
		use[i].index = uint32(i)
	}
	var end uint64
	for _, m := range h.Mappings.All() {
		u := &use[m.Build]
		u.live += m.Length
		u.fragments++
		p.Fragments++
		if m.Start != end || p.Fragments == 1 {
			p.fragmentsNeeded++
		}
		end = m.End()
	}
	p.BuildsAfter, p.FragmentsAfter = p.Builds, p.Fragments
	p.Urgent = p.Builds > 2*policy.MaxBuilds
	sel := selection{builds: make([]bool, len(h.Builds))}
	now := sel.layout(h)
	tooMany := p.Builds > policy.MaxBuilds
	tooScattered := p.Fragments > policy.MaxFragments && p.Fragments > 2*p.fragmentsNeeded
	if !tooMany && !tooScattered && !policy.tooManyPieces(now) {
		return p
	}
	if tooMany {
		chooseSmall(h, use, sel.builds, policy.MaxBuilds/2)
	}
	wanted := max(policy.MaxFragments/2, p.fragmentsNeeded+p.fragmentsNeeded/2)
	chooseScattered(h, use, sel.builds, wanted)
	p.Pieces = choosePieces(h, sel, policy)
	sel.pieces = p.Pieces
	p.describe(h, now, sel)
	return p
}

func (p CompactionPolicy) tooManyPieces(l layout) bool {
	return l.pieces > p.few && float64(l.pieces) > p.MaxPieces*float64(l.clusters)
}

// choosePieces returns from how many pieces on a cluster is copied, so that
// the least is copied that brings the average down to the middle between what
// is allowed and the best: it shall not be too high again with the next image.
func choosePieces(h *format.Header, sel selection, policy CompactionPolicy) int {
	if !policy.tooManyPieces(sel.layout(h)) {
		return 0
	}
	for _, sel.pieces = range []int{12, 8, 6, 5, 4, 3, 2} {
		if l := sel.layout(h); float64(l.pieces) <= (1+policy.MaxPieces)/2*float64(l.clusters) {
			return sel.pieces
		}
	}
	return 1
}

// chooseSmall marks the builds of which the image shows the least, so that
// keep builds are left with the new one, and those that are mostly dead.
// Taking the smallest first means that a block is copied about as often as the
// logarithm of the image's history, not once in every compaction.
func chooseSmall(h *format.Header, use []buildUse, victims []bool, keep int) {
	sorted := slices.Clone(use)
	slices.SortFunc(sorted, func(a, b buildUse) int {
		if a.live != b.live {
			if a.live < b.live {
				return -1
			}
			return 1
		}
		return int(a.index) - int(b.index)
	})
	for i, u := range sorted {
		dead := u.live < h.Builds[u.index].Blocks/4
		if i < len(sorted)-max(keep-1, 0) || dead {
			victims[u.index] = true
		}
	}
}

// chooseScattered marks the builds with the shortest runs until the image
// would have at most wanted mappings.
func chooseScattered(h *format.Header, use []buildUse, victims []bool, wanted int) {
	sorted := slices.Clone(use)
	slices.SortFunc(sorted, func(a, b buildUse) int {
		// a.fragments/a.live > b.fragments/b.live, without fractions
		x, y := uint64(a.fragments)*b.live, uint64(b.fragments)*a.live
		switch {
		case x > y:
			return -1
		case x < y:
			return 1
		}
		return int(a.index) - int(b.index)
	})
	for _, u := range sorted {
		if (selection{builds: victims}).layout(h).fragments <= wanted {
			return
		}
		victims[u.index] = true
	}
}

func (p *CompactionPlan) describe(h *format.Header, now layout, sel selection) {
	after := sel.layout(h)
	if after.builds >= now.builds && after.fragments >= now.fragments && after.pieces >= now.pieces {
		p.Pieces = 0
		return // nothing would be won
	}
	for i, v := range sel.builds {
		if v {
			p.Rewrite = append(p.Rewrite, h.Builds[i].ID)
		}
	}
	p.Blocks, p.BuildsAfter, p.FragmentsAfter = after.copied, after.builds, after.fragments
}

// compactionFile is images/<id>/compaction: the plan for an image, and when
// HeaderSHA256 is set, where the same content lies in a better layout.
type compactionFile struct {
	Version      int         `json:"version"`
	From         format.ID   `json:"from"`
	To           format.ID   `json:"to"`
	Rewrite      []format.ID `json:"rewrite"`
	Pieces       int         `json:"pieces,omitempty"` // since version 2
	HeaderSHA256 string      `json:"header_sha256"`    // of To; empty: not built yet
}

// Versions of the file; the list is append-only. A reader that meets a later
// one makes the plan anew.
const (
	compactionVersion1 = 1 // whole builds alone
	compactionVersion2 = 2 // and clusters in many pieces
)

const (
	compactionName    = "compaction"
	maxCompactionFile = 64 * format.MaxBuilds
)

// newCompaction returns the file of a plan, in the oldest version that can say
// it.
func newCompaction(p *CompactionPlan) *compactionFile {
	c := &compactionFile{Version: compactionVersion1, From: p.Image, Rewrite: p.Rewrite, Pieces: p.Pieces}
	if c.Pieces > 0 {
		c.Version = compactionVersion2
	}
	return c
}

func (c *compactionFile) built() bool { return c.HeaderSHA256 != "" }

func (s *Store) compactionPath(id format.ID) string {
	return path.Join(s.imageDir(id), compactionName)
}

// sealed is the file's content in the store: the digest is over the plan's
// bytes, as in a manifest.
type sealed struct {
	SHA256 string          `json:"sha256"`
	Plan   json.RawMessage `json:"plan"`
}

func encodeCompaction(c *compactionFile) ([]byte, error) {
	raw, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(sealed{SHA256: digestOf(raw), Plan: raw})
	return append(b, '\n'), err
}

func decodeCompaction(b []byte) (*compactionFile, error) {
	var f sealed
	if err := unmarshalStrict(b, &f); err != nil {
		return nil, fmt.Errorf("compaction: %w", err)
	}
	if digestOf(f.Plan) != f.SHA256 {
		return nil, errors.New("compaction: sha256: does not fit the content")
	}
	var c compactionFile
	if err := unmarshalStrict(f.Plan, &c); err != nil {
		return nil, fmt.Errorf("compaction: %w", err)
	}
	switch same, err := encodeCompaction(&c); {
	case err != nil || !bytes.Equal(same, b):
		return nil, errors.New("compaction: the file is not in the form in which it was written")
	case c.Version != compactionVersion1 && c.Version != compactionVersion2:
		return nil, fmt.Errorf("compaction: version: %d is not known, want %d or %d", c.Version, compactionVersion1, compactionVersion2)
	case c.Pieces < 0 || c.Pieces > clusterBlocks || c.Pieces > 0 && c.Version == compactionVersion1:
		return nil, fmt.Errorf("compaction: pieces: %d is not in 0…%d, or not for version %d", c.Pieces, clusterBlocks, c.Version)
	case c.To.IsZero() || c.To == c.From:
		return nil, errors.New("compaction: to: is no other image")
	case c.built() && !isDigest(c.HeaderSHA256):
		return nil, errors.New("compaction: header_sha256: is no SHA-256")
	}
	return &c, nil
}

// readCompaction returns the plan of an image, or nil when there is none.
func (s *Store) readCompaction(id format.ID) (*compactionFile, error) {
	name := s.compactionPath(id)
	b, err := s.readAll(name, maxCompactionFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c, err := decodeCompaction(b)
	if err == nil && c.From != id {
		err = fmt.Errorf("compaction: from: it is the plan of image %s", c.From)
	}
	if err != nil {
		return nil, &CorruptError{Image: id, File: name, Reason: err.Error()}
	}
	return c, nil
}

// writeCompaction replaces the plan of an image, durably.
func (s *Store) writeCompaction(c *compactionFile) error {
	b, err := encodeCompaction(c)
	if err != nil {
		return err
	}
	s.gcMu.Lock() // GC removes temporary files that nobody is writing
	defer s.gcMu.Unlock()
	return s.replaceFile(s.compactionPath(c.From), b)
}

// replaceFile puts a file in the place of another: the old or the new content
// is found after a crash.
func (s *Store) replaceFile(name string, content []byte) error {
	tmp := name + ".tmp"
	if err := s.fs.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.writeFile(tmp, content); err != nil {
		return err
	}
	if err := s.fs.SyncDir(path.Dir(name)); err != nil {
		return err
	}
	if err := s.fs.Rename(tmp, name); err != nil {
		return err
	}
	return s.fs.SyncDir(path.Dir(name))
}

// compacted returns the header of the best layout of the image whose header is
// h: its own, or that of the image that a finished compaction made of it. What
// is wrong with the other one is not the caller's matter: h holds the same.
func (s *Store) compacted(h *format.Header) *format.Header {
	for range 64 { // each step is a compaction; a ring would be a forgery
		c, err := s.readCompaction(h.Build)
		if err == nil && (c == nil || !c.built()) {
			return h
		}
		var next *format.Header
		if err == nil {
			next, err = s.compactedTo(c, h.Size)
		}
		if err != nil {
			s.log.Warn("a compacted layout cannot be used", "image", h.Build.String(), "err", err)
			return h
		}
		h = next
	}
	return h
}

// compactedTo reads the header that a plan names.
func (s *Store) compactedTo(c *compactionFile, size int64) (*format.Header, error) {
	h, b, err := s.readHeader(c.To)
	if err != nil {
		return nil, err
	}
	if digestOf(b) != c.HeaderSHA256 || h.Size != size {
		d, _ := hex.DecodeString(c.HeaderSHA256)
		return nil, &CorruptError{Image: c.To, File: s.headerPath(c.To), Reason: fmt.Sprintf("it is not the header %x that the compaction made", d[:4])}
	}
	return h, nil
}
