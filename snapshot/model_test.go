package snapshot

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"pgregory.net/rapid"
)

const modelBlocks = 24

// model is a store with running disks beside an oracle of byte arrays.
type model struct {
	t  *rapid.T
	fs *snaptest.FS
	s  *Store

	snaps []modelSnap
	disks []*modelDisk
	made  int // disks ever made: their names
}

type modelSnap struct {
	id    format.ID
	image format.ID
	want  []byte
}

type modelDisk struct {
	name string
	base *Image // nil: zeros
	o    *block.Overlay
	want []byte
}

func (m *model) ok(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (d *modelDisk) source() block.Source {
	if d.base == nil {
		return block.Zeros(modelBlocks * blockSize)
	}
	return d.base
}

// start begins a disk on a snapshot (a fork, when others run on it too), or on
// zeros.
func (m *model) start(t *rapid.T) {
	if len(m.disks) == 4 {
		return
	}
	d := &modelDisk{name: fmt.Sprintf("/disk%d", m.made), want: make([]byte, modelBlocks*blockSize)}
	m.made++
	if i := rapid.IntRange(-1, len(m.snaps)-1).Draw(t, "snapshot"); i >= 0 {
		var err error
		d.base, err = m.s.OpenImage(m.snaps[i].image)
		m.ok(err)
		copy(d.want, m.snaps[i].want)
	}
	var err error
	d.o, err = block.OpenOverlay(m.fs, d.name, d.source())
	m.ok(err)
	m.disks = append(m.disks, d)
}

func (m *model) disk(t *rapid.T) *modelDisk {
	if len(m.disks) == 0 {
		t.Skip("no disk")
	}
	return rapid.SampledFrom(m.disks).Draw(t, "disk")
}

func (m *model) span(t *rapid.T) (off, n int) {
	const size = modelBlocks * blockSize
	if rapid.Bool().Draw(t, "aligned") {
		b := rapid.IntRange(0, modelBlocks-1).Draw(t, "block")
		return b * blockSize, min(modelBlocks-b, rapid.IntRange(1, 6).Draw(t, "blocks")) * blockSize
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

// pause writes what the overlay changed as a new generation and goes on with it.
func (m *model) pause(t *rapid.T) {
	d := m.disk(t)
	w, err := m.s.NewImage(d.o.Size(), d.base)
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
	m.snaps = append(m.snaps, modelSnap{id: txn.ID(), image: id, want: bytes.Clone(d.want)})
	m.stopDisk(d)
	d.base, err = m.s.OpenImage(id)
	m.ok(err)
	d.o, err = block.OpenOverlay(m.fs, d.name, d.base)
	m.ok(err)
}

// stopDisk closes a disk and removes its overlay.
func (m *model) stopDisk(d *modelDisk) {
	m.ok(d.o.Close())
	m.ok(block.RemoveOverlay(m.fs, d.name))
	if d.base != nil {
		m.ok(d.base.Close())
	}
}

func (m *model) remove(t *rapid.T) {
	if len(m.snaps) == 0 {
		t.Skip("no snapshot")
	}
	i := rapid.IntRange(0, len(m.snaps)-1).Draw(t, "snapshot")
	m.ok(m.s.Delete(bg, m.snaps[i].id))
	m.snaps = append(m.snaps[:i], m.snaps[i+1:]...)
}

func (m *model) roots() []format.ID {
	var roots []format.ID
	for _, d := range m.disks {
		if d.base != nil {
			roots = append(roots, d.base.ID())
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
	m.s, err = Open("/store", Options{FS: m.fs})
	m.ok(err)
	for _, d := range m.disks {
		if d.base != nil {
			d.base, err = m.s.OpenImage(d.base.ID())
			m.ok(err)
		}
		d.o, err = block.OpenOverlay(m.fs, d.name, d.source())
		m.ok(err)
	}
}

// check compares everything with the oracle.
func (m *model) check(t *rapid.T) {
	for i, s := range m.snaps {
		img, err := m.s.OpenImage(s.image)
		m.ok(err)
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

func TestStoreAndOverlaysEqualOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &model{t: t, fs: snaptest.NewFS()}
		var err error
		m.s, err = Open("/store", Options{FS: m.fs})
		m.ok(err)
		t.Repeat(map[string]func(*rapid.T){
			"start": m.start, "write": m.write, "write2": m.write, "write3": m.write, "zero": m.zero,
			"pause": m.pause, "delete": m.remove, "gc": m.gc, "restart": m.restart, "power loss": m.powerLoss,
			"": m.check,
		})
		for _, s := range m.snaps {
			m.ok(m.s.Delete(bg, s.id))
		}
		for _, d := range m.disks {
			m.stopDisk(d)
		}
		m.gcAll()
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
