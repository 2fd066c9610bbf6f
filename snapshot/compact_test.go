package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
)

func openCompacting(t testing.TB, f *snaptest.FS, p CompactionPolicy) *Store {
	t.Helper()
	s, err := Open("/store", Options{FS: f, Compaction: p})
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// scatter makes a chain of n generations over an image of size blocks; each
// changes some blocks of it. It returns the last snapshot and its content.
func scatter(t testing.TB, s *Store, size int64, n int, seed uint64) (Manifest, []byte) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	want := make([]byte, size*blockSize)
	var img *Image
	var m Manifest
	for g := range n {
		var changes []change
		for _, b := range r.Perm(int(size))[:3] {
			fill := byte(g*3+len(changes))%255 + 1
			changes = append(changes, change{block: int64(b), data: pages(fill)})
			copy(want[b*blockSize:], pages(fill))
		}
		var prev format.ID
		if img != nil {
			prev = m.ID
		}
		parent := img
		m, img = snap(t, s, size*blockSize, parent, changes...)
		if parent != nil {
			must(t, parent.Close())
			must(t, s.Delete(bg, prev))
		}
	}
	must(t, img.Close())
	return m, want
}

func TestCompactKeepsContentAndBounds(t *testing.T) {
	for _, policy := range []CompactionPolicy{{MaxBuilds: 1}, {MaxBuilds: 3}, {MaxBuilds: 8}, {MaxBuilds: 99, MaxFragments: 4}} {
		s := openCompacting(t, snaptest.NewFS(), policy)
		m, want := scatter(t, s, 40, 20, 1)
		old := m.Memory.ID
		plan, err := s.PlanCompaction(old)
		must(t, err)
		if !plan.Needed() || plan.BuildsAfter > policy.MaxBuilds {
			t.Fatalf("%+v: plan %+v", policy, plan)
		}
		r, err := s.Compact(bg, old)
		must(t, err)
		if r.To == old || len(r.Switched) != 1 || r.Switched[0] != m.ID || r.Bytes != int64(plan.Blocks)*blockSize {
			t.Fatalf("%+v: report %+v, plan %+v", policy, r, plan)
		}
		before := m.Generation
		m, err = s.Manifest(m.ID)
		must(t, err)
		img, err := s.OpenImage(m.Memory.ID)
		must(t, err)
		h := img.Header()
		if m.Memory.ID != r.To || m.Generation != before || h.Generation != 19 ||
			len(h.Builds) != plan.BuildsAfter || h.Mappings.Len() != plan.FragmentsAfter {
			t.Fatalf("%+v: %d builds, %d mappings, want %+v", policy, len(h.Builds), h.Mappings.Len(), plan)
		}
		if !bytes.Equal(readImage(t, img), want) {
			t.Fatalf("%+v: the content has changed", policy)
		}
		must(t, img.Close())
		if again, err := s.Compact(bg, r.To); err != nil || again.To != r.To || again.Bytes != 0 {
			t.Fatalf("a second Compact did %+v, %v", again, err)
		}
	}
}

// A machine goes on with the old image while it is compacted and collected;
// its next pause builds on the new layout.
func TestCompactionLeavesReadersAlone(t *testing.T) {
	s := openCompacting(t, snaptest.NewFS(), CompactionPolicy{MaxBuilds: 4})
	m, want := scatter(t, s, 40, 20, 2)
	old, err := s.OpenImage(m.Memory.ID)
	must(t, err)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			got := make([]byte, len(want))
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := old.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Errorf("a reader was disturbed: %v", err)
					return
				}
			}
		})
	}
	_, err = s.Compact(bg, old.ID())
	must(t, err)
	_, err = s.GC(bg, nil, false)
	must(t, err)
	close(stop)
	wg.Wait()
	next, img := snap(t, s, old.Size(), old, change{block: 5, data: pages(77)})
	if n := len(img.Header().Builds); n > 3 { // compacted to 2, and its own
		t.Fatalf("the next generation reads from %d builds", n)
	}
	copy(want[5*blockSize:], pages(77))
	must(t, s.Delete(bg, m.ID))
	must(t, old.Close())
	_, err = s.GC(bg, []format.ID{next.Memory.ID}, false)
	must(t, err)
	if !bytes.Equal(readImage(t, img), want) {
		t.Fatal("the next generation reads wrong")
	}
	if _, err := s.OpenImage(m.Memory.ID); !errors.Is(err, ErrNotFound) {
		t.Fatalf("the old layout is still there: %v", err)
	}
}

// A machine that is paused again and again, with compaction and GC going on
// beside it, stays bounded in builds, fragments and bytes. Who makes images
// faster than they are compacted waits at twice the bound.
func TestHundredsOfPausesStayBounded(t *testing.T) {
	const blocks, pauses, maxBuilds = 64, 400, 8
	f := snaptest.NewFS()
	s := openCompacting(t, f, CompactionPolicy{MaxBuilds: maxBuilds})
	r := rand.New(rand.NewPCG(3, 3))
	want := make([]byte, blocks*blockSize)
	var img *Image
	var last format.ID
	waited := 0
	var wg sync.WaitGroup
	for i := range pauses {
		var changes []change
		for _, b := range r.Perm(blocks)[:4] {
			fill := byte(r.IntN(256))
			changes = append(changes, change{block: int64(b), data: pages(fill)})
			copy(want[b*blockSize:], pages(fill))
		}
		m, next := snap(t, s, blocks*blockSize, img, changes...)
		if img != nil {
			must(t, img.Close())
			must(t, s.Delete(bg, last))
		}
		img, last = next, m.ID
		wg.Wait() // the compaction of the pause before ran beside this one
		wg.Go(func() {
			_, err := s.Compact(bg, m.Memory.ID)
			if err == nil {
				_, err = s.GC(bg, nil, false)
			}
			if err != nil {
				t.Error(err)
			}
		})
		n := len(img.Header().Builds)
		if n > 2*maxBuilds {
			wg.Wait()
			waited++
		}
		if n > 2*maxBuilds+1 {
			t.Errorf("pause %d: %d builds", i, n)
			break
		}
	}
	t.Logf("%d of %d pauses waited for a compaction", waited, pauses)
	wg.Wait()
	if !bytes.Equal(readImage(t, img), want) {
		t.Fatal("the content is wrong")
	}
	must(t, img.Close())
	_, err := s.GC(bg, nil, false)
	must(t, err)
	var stored int
	for _, name := range f.Files() {
		stored += len(f.Content(name))
	}
	// Each build may be up to three quarters dead.
	if limit := 4*blocks*blockSize + 2*maxBuilds*16*blockSize; stored > limit {
		t.Fatalf("%d bytes are stored for an image of %d; the limit is %d", stored, blocks*blockSize, limit)
	}
}

// A compaction that was stopped goes on with its plan; what the first try left
// is not leaked.
func TestStoppedCompactionGoesOn(t *testing.T) {
	f := snaptest.NewFS()
	s := openCompacting(t, f, CompactionPolicy{MaxBuilds: 2})
	m, want := scatter(t, s, 30, 8, 4)
	f.FailWith(func(_ int, what string) error {
		if what[:5] == "write" && bytes.Contains([]byte(what), []byte("/data")) {
			return syscall.EIO
		}
		return nil
	})
	_, err := s.Compact(bg, m.Memory.ID)
	isErr(t, err, syscall.EIO)
	f.FailWith(nil)
	plan, err := s.readCompaction(m.Memory.ID)
	must(t, err)
	ctx, cancel := context.WithCancel(bg)
	cancel()
	_, err = s.Compact(ctx, m.Memory.ID)
	isErr(t, err, context.Canceled)

	s, err = Open("/store", Options{FS: f.Restart(), Compaction: CompactionPolicy{MaxBuilds: 99}})
	must(t, err)
	r, err := s.Compact(bg, m.Memory.ID) // the plan counts, not today's policy
	must(t, err)
	if r.To != plan.To || len(plan.Rewrite) == 0 {
		t.Fatalf("the plan was not followed: %+v, plan %+v", r, plan)
	}
	img, err := s.OpenImage(r.To)
	must(t, err)
	defer img.Close()
	if !bytes.Equal(readImage(t, img), want) {
		t.Fatal("the content has changed")
	}
}

// The two kinds of damage to a plan: it is found, it costs nothing but the
// work, and it is made anew.
func TestDamagedPlanIsFoundAndMadeAnew(t *testing.T) {
	f := snaptest.NewFS()
	s := openCompacting(t, f, CompactionPolicy{MaxBuilds: 2})
	m, want := scatter(t, s, 30, 8, 5)
	old, err := s.OpenImage(m.Memory.ID)
	must(t, err)
	defer old.Close()
	_, err = s.Compact(bg, old.ID())
	must(t, err)
	name := s.compactionPath(old.ID())
	content := f.Content(name)
	for i := range content {
		content[i] ^= 4
		problems, err := s.Verify(bg, nil)
		must(t, err)
		if len(problems) != 1 || problems[0].File != name {
			t.Fatalf("byte %d: problems %v", i, problems)
		}
		if h := s.compacted(old.Header()); h.Build != old.ID() {
			t.Fatalf("byte %d: the damaged plan was followed", i)
		}
		content[i] ^= 4
	}
	content[9] ^= 4
	r, err := s.Compact(bg, old.ID())
	must(t, err)
	if r.To == old.ID() {
		t.Fatal("nothing was done")
	}
	img, err := s.OpenImage(r.To)
	must(t, err)
	defer img.Close()
	if !bytes.Equal(readImage(t, img), want) {
		t.Fatal("the content has changed")
	}
}

func TestCompactionTranscript(t *testing.T) {
	f := snaptest.NewFS()
	l, err := newLife(f)
	must(t, err)
	must(t, l.tryCommit("a", "", change{data: pages(1, 1, 1)}))
	must(t, l.tryCommit("b", "a", change{block: 1, data: pages(2)}))
	must(t, l.tryCommit("c", "b", change{block: 2, data: pages(3)}))
	must(t, l.s.Delete(bg, l.ids["a"]))
	must(t, l.s.Delete(bg, l.ids["b"]))
	_, err = l.s.GC(bg, nil, false)
	must(t, err)
	m, err := l.s.Manifest(l.ids["c"])
	must(t, err)
	f.Transcript()
	_, err = l.s.Compact(bg, m.Memory.ID)
	must(t, err)
	compareTranscript(t, f, fmt.Sprintf(`
create /store/images/<1>/compaction.tmp
write /store/images/<1>/compaction.tmp 0 N
sync /store/images/<1>/compaction.tmp
syncdir /store/images/<1>
rename /store/images/<1>/compaction.tmp /store/images/<1>/compaction
syncdir /store/images/<1>
mkdir /store/images/<2>
create /store/images/<2>/data
write /store/images/<2>/data 0 %d
write /store/images/<2>/data %d 88
sync /store/images/<2>/data
create /store/images/<2>/header
write /store/images/<2>/header 0 168
sync /store/images/<2>/header
syncdir /store/images/<2>
syncdir /store/images
create /store/images/<1>/compaction.tmp
write /store/images/<1>/compaction.tmp 0 N
sync /store/images/<1>/compaction.tmp
syncdir /store/images/<1>
rename /store/images/<1>/compaction.tmp /store/images/<1>/compaction
syncdir /store/images/<1>
create /store/snapshots/<3>/manifest.json.tmp
write /store/snapshots/<3>/manifest.json.tmp 0 N
sync /store/snapshots/<3>/manifest.json.tmp
syncdir /store/snapshots/<3>
rename /store/snapshots/<3>/manifest.json.tmp /store/snapshots/<3>/manifest.json
syncdir /store/snapshots/<3>
`, 3*blockSize, 3*blockSize))
}

// What GC does where an image was compacted: the new manifest's name is made
// certain before the old layout goes.
func TestGCAfterCompactionTranscript(t *testing.T) {
	f := snaptest.NewFS()
	l, err := newLife(f)
	must(t, err)
	must(t, l.tryCommit("a", "", change{data: pages(1, 1, 1)}))
	m, err := l.s.Manifest(l.ids["a"])
	must(t, err)
	f.Transcript()
	w := &compactionFile{Version: 1, From: m.Memory.ID, Rewrite: []format.ID{m.Memory.ID}}
	must(t, l.s.aim(w))
	_, err = l.s.Compact(bg, m.Memory.ID)
	must(t, err)
	f.Transcript()
	_, err = l.s.GC(bg, nil, false)
	must(t, err)
	compareTranscript(t, f, `
syncdir /store/snapshots/<2>
remove /store/images/<1>/compaction
remove /store/images/<1>/header
remove /store/images/<1>/data
remove /store/images/<1>
syncdir /store/images
`)
}

// A plan was replaced, but the sync of its name failed, and others have built
// on what it names: when a loss of power brings the old plan back, carrying it
// out must not touch what they need.
func TestPlanThatComesBackBreaksNobody(t *testing.T) {
	f := snaptest.NewFS()
	s := openCompacting(t, f, CompactionPolicy{MaxBuilds: 2})
	m, want := scatter(t, s, 30, 8, 6)
	old, err := s.OpenImage(m.Memory.ID)
	must(t, err)
	renamed := 0
	f.FailWith(func(_ int, what string) error {
		if what[:6] == "rename" {
			renamed++
		}
		if renamed == 2 && what == "syncdir "+s.imageDir(old.ID()) {
			return syscall.EIO
		}
		return nil
	})
	_, err = s.Compact(bg, old.ID())
	isErr(t, err, syscall.EIO)
	f.FailWith(nil)
	child, img := snap(t, s, old.Size(), old, change{block: 3, data: pages(200)})
	if len(img.Header().Builds) != 2 {
		t.Fatalf("the child does not build on the new layout: %d builds", len(img.Header().Builds))
	}

	f = f.Crash(nil)
	s, err = Open("/store", Options{FS: f, Compaction: CompactionPolicy{MaxBuilds: 2}})
	must(t, err)
	c, err := s.readCompaction(old.ID())
	must(t, err)
	if c == nil || c.built() {
		t.Fatalf("this test needs the old plan back: %+v", c)
	}
	copy(want[3*blockSize:], pages(200))
	for _, fails := range []error{syscall.ENOSPC, nil} { // given up half way, then done
		f.FailWith(func(_ int, what string) error {
			if strings.HasPrefix(what, "write") && strings.Contains(what, "/data") {
				return fails
			}
			return nil
		})
		if _, err := s.Compact(bg, old.ID()); !errors.Is(err, fails) {
			t.Fatalf("Compact: %v, want %v", err, fails)
		}
		f.FailWith(nil)
		_, err = s.GC(bg, nil, false)
		must(t, err)
		img, err = s.OpenImage(child.Memory.ID)
		must(t, err)
		if !bytes.Equal(readImage(t, img), want) {
			t.Fatal("the child lost blocks")
		}
		must(t, img.Close())
	}
}
