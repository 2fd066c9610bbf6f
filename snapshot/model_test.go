package snapshot

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"strconv"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"pgregory.net/rapid"
)

// model is a store with running disks beside an oracle of byte arrays.
type model struct {
	t      *rapid.T
	fs     *snaptest.FS
	s      *Store
	blocks int // of each disk

	snaps []modelSnap
	disks []*modelDisk
	made  int // disks ever made: their names
}

type modelSnap struct {
	id   format.ID
	want []byte
}

type modelDisk struct {
	name string
	base *Image // nil: zeros
	last *Image // the newest snapshot of it while it goes on; nil: none
	o    *block.Overlay
	want []byte
	size int64
}

func (m *model) ok(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (d *modelDisk) source() block.Source {
	if d.base == nil {
		return block.Zeros(d.size)
	}
	return d.base
}

// start begins a disk on a snapshot (a fork, when others run on it too), or on
// zeros.
func (m *model) start(t *rapid.T) {
	if len(m.disks) == 4 {
		return
	}
	d := &modelDisk{name: fmt.Sprintf("/disk%d", m.made), want: make([]byte, m.blocks*blockSize), size: int64(m.blocks) * blockSize}
	m.made++
	if i := rapid.IntRange(-1, len(m.snaps)-1).Draw(t, "snapshot"); i >= 0 {
		d.base = m.openSnap(m.snaps[i].id)
		copy(d.want, m.snaps[i].want)
	}
	var err error
	d.o, err = block.OpenOverlay(m.fs, d.name, d.source())
	m.ok(err)
	m.disks = append(m.disks, d)
}

// openSnap opens the image that the snapshot's manifest names now.
func (m *model) openSnap(id format.ID) *Image {
	man, err := m.s.Manifest(id)
	m.ok(err)
	img, err := m.s.OpenImage(man.Disk.ID)
	m.ok(err)
	return img
}

func (m *model) disk(t *rapid.T) *modelDisk {
	if len(m.disks) == 0 {
		t.Skip("no disk")
	}
	return rapid.SampledFrom(m.disks).Draw(t, "disk")
}

func (m *model) span(t *rapid.T) (off, n int) {
	size := m.blocks * blockSize
	if rapid.Bool().Draw(t, "aligned") {
		b := rapid.IntRange(0, m.blocks-1).Draw(t, "block")
		return b * blockSize, min(m.blocks-b, rapid.IntRange(1, 6).Draw(t, "blocks")) * blockSize
	}
	off = rapid.IntRange(0, size-1).Draw(t, "off")
	return off, min(size-off, rapid.IntRange(1, 3*blockSize).Draw(t, "n"))
}

func (m *model) write(t *rapid.T) {
	d := m.disk(t)
	off, n := m.span(t)
	p := bytes.Repeat([]byte{rapid.SampledFrom([]byte{0, 1, 2, 3}).Draw(t, "fill")}, n)
	_, err := d.o.WriteAt(p, int64(off))
	m.ok(err)
	copy(d.want[off:], p)
}

func (m *model) zero(t *rapid.T) {
	d := m.disk(t)
	off, n := m.span(t)
	m.ok(d.o.Zero(int64(off), int64(n)))
	clear(d.want[off : off+n])
}

// capture commits what the overlay changed, as a generation after the newest
// one of the disk.
func (m *model) capture(d *modelDisk) {
	parent := d.base
	if d.last != nil {
		parent = d.last
	}
	w, err := m.s.NewImage(d.o.Size(), parent)
	m.ok(err)
	defer w.Abort()
	for _, run := range dirtyRuns(d.o) {
		if run.kind == format.Zero {
			m.ok(w.Zero(run.off, run.n))
			continue
		}
		p := make([]byte, run.n)
		_, err := d.o.ReadAt(p, run.off)
		m.ok(err)
		m.ok(w.WriteAt(p, run.off))
	}
	id, err := w.Finish(bg)
	m.ok(err)
	txn, err := m.s.Begin()
	m.ok(err)
	defer txn.Abort()
	m.ok(txn.Commit(bg, Manifest{Kind: KindPause, Disk: ImageRef{ID: id}}))
	m.snaps = append(m.snaps, modelSnap{id: txn.ID(), want: bytes.Clone(d.want)})
}

// pause captures the disk and goes on with the capture.
func (m *model) pause(t *rapid.T) {
	d := m.disk(t)
	m.capture(d)
	m.stopDisk(d)
	d.base = m.openSnap(m.snaps[len(m.snaps)-1].id)
	var err error
	d.o, err = block.OpenOverlay(m.fs, d.name, d.base)
	m.ok(err)
}

// snapshot captures the disk, which goes on as it is.
func (m *model) snapshot(t *rapid.T) {
	d := m.disk(t)
	m.capture(d)
	if d.last != nil {
		m.ok(d.last.Close())
	}
	d.last = m.openSnap(m.snaps[len(m.snaps)-1].id)
}

// compact compacts a snapshot's image, while disks may run on it.
func (m *model) compact(t *rapid.T) {
	if len(m.snaps) == 0 {
		return
	}
	man, err := m.s.Manifest(rapid.SampledFrom(m.snaps).Draw(t, "snapshot").id)
	m.ok(err)
	r, err := m.s.Compact(bg, man.Disk.ID)
	m.ok(err)
	p, err := m.s.PlanCompaction(r.To)
	m.ok(err)
	if p.Needed() || p.Builds > tight.MaxBuilds {
		m.t.Fatalf("not compact after Compact: %+v", p)
	}
}

// stopDisk closes a disk and removes its overlay.
func (m *model) stopDisk(d *modelDisk) {
	m.ok(d.o.Close())
	m.ok(block.RemoveOverlay(m.fs, d.name))
	for _, img := range []*Image{d.base, d.last} {
		if img != nil {
			m.ok(img.Close())
		}
	}
	d.base, d.last = nil, nil
}

func (m *model) remove(t *rapid.T) {
	if len(m.snaps) == 0 {
		return
	}
	i := rapid.IntRange(0, len(m.snaps)-1).Draw(t, "snapshot")
	m.ok(m.s.Delete(bg, m.snaps[i].id))
	m.snaps = append(m.snaps[:i], m.snaps[i+1:]...)
}

func (m *model) roots() []format.ID {
	var roots []format.ID
	for _, d := range m.disks {
		for _, img := range []*Image{d.base, d.last} {
			if img != nil {
				roots = append(roots, img.ID())
			}
		}
	}
	return roots
}

func (m *model) gc(*rapid.T) {
	_, err := m.s.GC(bg, m.roots(), false)
	m.ok(err)
}

// restart is the death of the process and the start of the next one.
func (m *model) restart(*rapid.T) {
	m.fs = m.fs.Restart()
	m.reopen()
}

// powerLoss loses what was not synced, after a flush of every disk.
func (m *model) powerLoss(*rapid.T) {
	for _, d := range m.disks {
		m.ok(d.o.Flush())
	}
	m.fs = m.fs.Crash(nil)
	m.reopen()
}

func (m *model) reopen() {
	var err error
	m.s, err = Open("/store", Options{FS: m.fs, Compaction: tight})
	m.ok(err)
	for _, d := range m.disks {
		for _, img := range []**Image{&d.base, &d.last} {
			if *img != nil {
				*img, err = m.s.OpenImage((*img).ID())
				m.ok(err)
			}
		}
		d.o, err = block.OpenOverlay(m.fs, d.name, d.source())
		m.ok(err)
	}
}

// check compares everything with the oracle.
func (m *model) check(t *rapid.T) {
	for i, s := range m.snaps {
		img := m.openSnap(s.id)
		m.compare(fmt.Sprintf("snapshot %d", i), img, s.want)
		m.ok(img.Close())
	}
	for _, d := range m.disks {
		m.compare(d.name, d.o, d.want)
	}
}

func (m *model) compare(what string, src block.Source, want []byte) {
	got := make([]byte, len(want)+1)
	n, err := src.ReadAt(got, 0)
	if n != len(want) || err != io.EOF {
		m.t.Fatalf("%s: read %d bytes, %v", what, n, err)
	}
	if !bytes.Equal(got[:n], want) {
		m.t.Fatalf("%s differs from the oracle", what)
	}
	for off := int64(0); off < src.Size(); {
		kind, n := src.Span(off)
		if n <= 0 || n%blockSize != 0 || off+n > src.Size() || (kind != format.Zero && kind != format.Data) {
			m.t.Fatalf("%s: Span(%d) = %v, %d", what, off, kind, n)
		}
		if kind == format.Zero && len(bytes.Trim(want[off:off+n], "\x00")) > 0 {
			m.t.Fatalf("%s: Span(%d) calls data zero", what, off)
		}
		off += n
	}
}

func newModel(t *rapid.T, blocks int) *model {
	m := &model{t: t, fs: snaptest.NewFS(), blocks: blocks}
	m.reopen()
	return m
}

// end removes everything and expects that nothing is left.
func (m *model) end() {
	for _, s := range m.snaps {
		m.ok(m.s.Delete(bg, s.id))
	}
	for _, d := range m.disks {
		m.stopDisk(d)
	}
	m.gcAll()
}

// Few sequences, long ones, everything compared after every step.
func TestStoreAndOverlaysEqualOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newModel(t, 24)
		t.Repeat(map[string]func(*rapid.T){
			"start": m.start, "write": m.write, "write2": m.write, "write3": m.write, "zero": m.zero,
			"pause": m.pause, "snapshot": m.snapshot, "compact": m.compact,
			"delete": m.remove, "gc": m.gc, "restart": m.restart, "power loss": m.powerLoss,
			"": m.check,
		})
		m.end()
	})
}

// Very many sequences, short ones of a small disk, compared at their end: each
// begins with a disk that has data, so that every step has something to spoil.
func TestManySequencesEqualOracle(t *testing.T) {
	checks := flag.Lookup("rapid.checks").Value
	if checks.String() == "100" { // rapid's own default: nobody asked for another
		must(t, checks.Set(strconv.Itoa(sequences)))
		defer func() { must(t, checks.Set("100")) }()
	}
	rapid.Check(t, func(t *rapid.T) {
		m := newModel(t, 6)
		m.start(t)
		m.write(t)
		m.pause(t)
		steps := []func(*rapid.T){
			m.write, m.write, m.zero, m.zero, m.pause, m.pause, m.snapshot, m.start,
			m.compact, m.remove, m.gc, m.restart, m.powerLoss,
		}
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			rapid.SampledFrom(steps).Draw(t, "step")(t)
		}
		m.check(t)
		m.end()
	})
}

// gcAll expects that nothing is left when nothing is needed.
func (m *model) gcAll() {
	m.disks = nil
	m.gc(nil)
	for _, f := range m.fs.Files() {
		if f != "/store/lock" {
			m.t.Fatalf("%s leaked", f)
		}
	}
}

type dirtyRun struct {
	off, n int64
	kind   format.Kind
}

func dirtyRuns(o *block.Overlay) []dirtyRun {
	var runs []dirtyRun
	o.Dirty(func(off, n int64, kind format.Kind) bool {
		runs = append(runs, dirtyRun{off, n, kind})
		return true
	})
	return runs
}
