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
}

func (p CompactionPolicy) withDefaults() CompactionPolicy {
	if p.MaxBuilds <= 0 {
		p.MaxBuilds = 32
	}
	if p.MaxFragments <= 0 {
		p.MaxFragments = 1 << 16
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
	// Rewrite lists the builds whose blocks would be copied into a new one;
	// empty: the image is inside of its bounds.
	Rewrite         []format.ID
	Blocks          uint64 // that would be copied
	BuildsAfter     int
	FragmentsAfter  int
	fragmentsNeeded int // of an image in one build
}

// Needed reports whether there is something to do.
func (p *CompactionPlan) Needed() bool { return len(p.Rewrite) > 0 }

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
	tooMany := p.Builds > policy.MaxBuilds
	p.Urgent = p.Builds > 2*policy.MaxBuilds
	if !tooMany && (p.Fragments <= policy.MaxFragments || p.Fragments <= 2*p.fragmentsNeeded) {
		return p
	}
	victims := make([]bool, len(h.Builds))
	if tooMany {
		chooseSmall(h, use, victims, policy.MaxBuilds/2)
	}
	wanted := max(policy.MaxFragments/2, p.fragmentsNeeded+p.fragmentsNeeded/2)
	chooseScattered(h, use, victims, wanted)
	p.describe(h, use, victims)
	return p
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
		if fragmentsAfter(h, victims) <= wanted {
			return
		}
		victims[u.index] = true
	}
}

// fragmentsAfter counts the mappings when the victims' blocks lie in a new
// build, in the order of the image.
func fragmentsAfter(h *format.Header, victims []bool) int {
	n := 0
	var end uint64
	open := false // the last mapping is of a victim
	for _, m := range h.Mappings.All() {
		if !victims[m.Build] || !open || m.Start != end {
			n++
		}
		open, end = victims[m.Build], m.End()
	}
	return n
}

func (p *CompactionPlan) describe(h *format.Header, use []buildUse, victims []bool) {
	for i, v := range victims {
		if v {
			p.Rewrite = append(p.Rewrite, h.Builds[i].ID)
			p.Blocks += use[i].live
		}
	}
	p.FragmentsAfter = fragmentsAfter(h, victims)
	p.BuildsAfter = p.Builds - len(p.Rewrite) + 1
	if p.BuildsAfter >= p.Builds && p.FragmentsAfter >= p.Fragments {
		// Nothing would be won.
		p.Rewrite, p.Blocks = nil, 0
		p.BuildsAfter, p.FragmentsAfter = p.Builds, p.Fragments
	}
}

// compactionFile is images/<id>/compaction: the plan for an image, and when
// HeaderSHA256 is set, where the same content lies in a better layout.
type compactionFile struct {
	Version      int         `json:"version"`
	From         format.ID   `json:"from"`
	To           format.ID   `json:"to"`
	Rewrite      []format.ID `json:"rewrite"`
	HeaderSHA256 string      `json:"header_sha256"` // of To; empty: not built yet
}

const (
	compactionVersion = 1
	compactionName    = "compaction"
	maxCompactionFile = 64 * format.MaxBuilds
)

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
	case c.Version != compactionVersion:
		return nil, fmt.Errorf("compaction: version: %d is not known, want %d", c.Version, compactionVersion)
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
