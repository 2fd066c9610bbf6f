package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
)

// life is a run of commits, deletions and collections, and what is known of
// their outcome by the answers of the store.
type life struct {
	s *Store
	// contents of the snapshots that must exist, may exist, and both by name
	must, may map[string][]byte
	ids       map[string]format.ID
	failed    int // steps that returned an error
}

// tight makes nearly every image one for compaction: for the number of its
// builds, or for its pieces alone.
var tight = CompactionPolicy{MaxBuilds: 2, MaxPieces: 1.5, few: 1}

func newLife(f *snaptest.FS) (*life, error) {
	s, err := Open("/store", Options{FS: f, Compaction: tight})
	return &life{s: s, must: map[string][]byte{}, may: map[string][]byte{}, ids: map[string]format.ID{}}, err
}

// run does everything that changes a store.
func (l *life) run() {
	l.commit("a", "", pages(1, 2, 3, 0), change{data: pages(1, 2, 3)})
	l.commit("b", "a", pages(1, 9, 0, 0), change{block: 1, data: pages(9, 0)})
	l.delete("a")
	l.gc()
	l.commit("c", "b", pages(1, 9, 0, 4), change{block: 3, data: pages(4)})
	running := l.open("c") // as a machine has it that goes on meanwhile
	l.compact("c")
	l.gc()
	l.commitOn(running, "e", pages(1, 9, 8, 4), change{block: 2, data: pages(8)})
	l.gc()
	l.compact("e")
	l.close(running)
	l.delete("b")
	l.gc()
	l.delete("c")
	l.gc()
	l.delete("e")
	l.gc()
	l.commit("d", "", pages(0, 0, 0, 7), change{block: 3, data: pages(7)})
}

func (l *life) commit(name, parent string, want []byte, changes ...change) {
	l.outcome(name, want, l.tryCommit(name, parent, changes...))
}

func (l *life) commitOn(base *Image, name string, want []byte, changes ...change) {
	if base != nil {
		l.outcome(name, want, l.tryCommitOn(base, name, changes...))
	}
}

func (l *life) outcome(name string, want []byte, err error) {
	if err != nil {
		l.failed++
		l.may[name] = want
		return
	}
	l.must[name] = want
}

func (l *life) open(name string) *Image {
	m, err := l.s.Manifest(l.ids[name])
	if err != nil {
		return nil // it could not be made
	}
	img, err := l.s.OpenImage(m.Memory.ID)
	if err != nil {
		return nil
	}
	return img
}

func (l *life) close(img *Image) {
	if img != nil && img.Close() != nil {
		l.failed++
	}
}

func (l *life) compact(name string) {
	m, err := l.s.Manifest(l.ids[name])
	if err != nil {
		return
	}
	if _, err := l.s.Compact(bg, m.Memory.ID); err != nil {
		l.failed++
	}
}

func (l *life) tryCommit(name, parent string, changes ...change) error {
	if parent == "" {
		return l.tryCommitOn(nil, name, changes...)
	}
	m, err := l.s.Manifest(l.ids[parent])
	if err != nil {
		return err
	}
	base, err := l.s.OpenImage(m.Memory.ID)
	if err != nil {
		return err
	}
	defer base.Close()
	return l.tryCommitOn(base, name, changes...)
}

func (l *life) tryCommitOn(base *Image, name string, changes ...change) error {
	w, err := makeImage(l.s, 4*blockSize, base, changes...)
	if w != nil {
		defer w.Abort()
	}
	if err != nil {
		return err
	}
	txn, err := l.s.Begin()
	if err != nil {
		return err
	}
	defer txn.Abort()
	l.ids[name] = txn.ID()
	st, err := txn.StateFile()
	if err != nil {
		return err
	}
	if _, err := st.Write([]byte("state of " + name)); err != nil {
		return err
	}
	return txn.Commit(bg, Manifest{Name: name, Kind: KindSnapshot, Memory: ImageRef{ID: w.ID()}})
}

func (l *life) delete(name string) {
	want, ok := l.must[name]
	if !ok {
		return
	}
	delete(l.must, name)
	if err := l.s.Delete(bg, l.ids[name]); err != nil {
		l.failed++
		l.may[name] = want
	}
}

func (l *life) gc() {
	if _, err := l.s.GC(bg, nil, false); err != nil {
		l.failed++
	}
}

// check opens the store that is left: what must exist exists, whole; nothing
// else is there but what may exist; and after a GC nothing leaks.
func (l *life) check(f *snaptest.FS) error {
	s, err := Open("/store", Options{FS: f, Compaction: tight})
	if err != nil {
		return err
	}
	defer s.Close()
	for range 2 { // before and after the GC
		if err := l.checkOnce(s); err != nil {
			return err
		}
		if _, err := s.GC(bg, nil, false); err != nil {
			return err
		}
	}
	if got, want := f.Files(), needed(s); !slices.Equal(got, want) {
		return fmt.Errorf("after the GC there are\n%q, needed are\n%q", got, want)
	}
	if err := l.finishCompactions(s); err != nil {
		return err
	}
	if got, want := f.Files(), needed(s); !slices.Equal(got, want) {
		return fmt.Errorf("after compaction and GC there are\n%q, needed are\n%q", got, want)
	}
	// The store can still be written.
	n, _ := newLife(f)
	n.s = s
	if err := n.tryCommit("new", "", change{data: pages(1)}); err != nil {
		return fmt.Errorf("commit after recovery: %w", err)
	}
	return nil
}

// finishCompactions carries out every plan, old or new: all images are inside
// of their bounds then, and hold what they held.
func (l *life) finishCompactions(s *Store) error {
	manifests, _ := s.Manifests()
	for _, m := range manifests {
		if _, err := s.Compact(bg, m.Memory.ID); err != nil {
			return err
		}
	}
	if err := l.checkOnce(s); err != nil {
		return fmt.Errorf("after compaction: %w", err)
	}
	if _, err := s.GC(bg, nil, false); err != nil {
		return err
	}
	manifests, _ = s.Manifests()
	for _, m := range manifests {
		if p, err := s.PlanCompaction(m.Memory.ID); err != nil || p.Needed() || p.Builds > tight.MaxBuilds {
			return fmt.Errorf("%s is not compact: %+v, %w", m.Name, p, err)
		}
	}
	return l.checkOnce(s)
}

func (l *life) checkOnce(s *Store) error {
	problems, err := s.Verify(bg, nil)
	if err != nil || len(problems) > 0 {
		return fmt.Errorf("verify: %v, %v", problems, err)
	}
	manifests, errs := s.Manifests()
	if len(errs) > 0 {
		return errs[0]
	}
	seen := map[string]bool{}
	for _, m := range manifests {
		want, ok := l.must[m.Name]
		if !ok {
			if want, ok = l.may[m.Name]; !ok {
				return fmt.Errorf("%s is back", m.Name)
			}
		}
		seen[m.Name] = true
		if _, err := s.StatePath(m.ID); err != nil {
			return err
		}
		img, err := s.OpenImage(m.Memory.ID)
		if err != nil {
			return err
		}
		got := make([]byte, img.Size())
		_, err = img.ReadAt(got, 0)
		if err := errors.Join(err, img.Close()); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%s has another content", m.Name)
		}
	}
	for name := range l.must {
		if !seen[name] {
			return fmt.Errorf("%s is lost", name)
		}
	}
	return nil
}

// needed lists the files that the manifests need.
func needed(s *Store) []string {
	files := map[string]bool{"/store/lock": true}
	manifests, _ := s.Manifests()
	for _, m := range manifests {
		files[s.manifestPath(m.ID)] = true
		files[s.statePath(m.ID)] = true
		for id := m.Memory.ID; ; {
			files[s.headerPath(id)] = true
			files[s.dataPath(id)] = true
			h, _, _ := s.readHeader(id)
			for _, b := range h.Builds {
				files[s.dataPath(b.ID)] = true
			}
			c, _ := s.readCompaction(id)
			if c == nil {
				break
			}
			files[s.compactionPath(id)] = true
			if !c.built() {
				break
			}
			id = c.To
		}
	}
	var out []string
	for f := range files {
		out = append(out, f)
	}
	sort.Strings(out)
	return out
}

var errPower = errors.New("power lost")

// After a loss of power before any operation, with all, none or some of what
// was not synced, the store holds the old state or the new one.
func TestCrashAtEveryOperation(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	for n := 0; ; n += stride {
		f := snaptest.NewFS()
		l, err := newLife(f)
		must(t, err)
		f.FailWith(func(op int, _ string) error {
			if op >= n {
				return errPower
			}
			return nil
		})
		l.run()
		some := func(string) bool { return r.IntN(2) == 0 }
		after := map[string]*snaptest.FS{
			"everything lost": f.Crash(nil), "nothing lost": f.Restart(),
			"some lost": f.Crash(some), "some others lost": f.Crash(some),
		}
		for what, c := range after {
			if err := l.check(c); err != nil {
				t.Fatalf("crash before operation %d, %s: %v", n, what, err)
			}
		}
		if l.failed == 0 {
			if n < 150 {
				t.Fatalf("the run has only %d operations", n)
			}
			return
		}
	}
}

// One operation fails, the program goes on: nothing is half made, nothing that
// was acknowledged is lost, in this process and in the next. A write that fails
// leaves half of its bytes.
func TestFailEveryOperation(t *testing.T) {
	for _, cause := range []error{syscall.EIO, syscall.ENOSPC} {
		t.Run(cause.Error(), func(t *testing.T) { failEveryOperation(t, cause) })
	}
}

func failEveryOperation(t *testing.T, cause error) {
	for n := 0; ; n += stride {
		f := snaptest.NewFS()
		l, err := newLife(f)
		must(t, err)
		hit := ""
		f.FailWith(func(op int, what string) error {
			if op == n {
				hit = what
				return cause
			}
			return nil
		})
		l.run()
		f.FailWith(nil)
		if hit == "" {
			if l.failed != 0 {
				t.Fatal("a run without a failure failed")
			}
			return
		}
		if err := l.checkOnce(l.s); err != nil {
			t.Fatalf("operation %d (%s) failed with %v: %v", n, hit, cause, err)
		}
		must(t, l.s.Close())
		if err := l.check(f.Crash(nil)); err != nil {
			t.Fatalf("operation %d (%s) failed with %v, then a crash: %v", n, hit, cause, err)
		}
		if err := l.check(f.Restart()); err != nil {
			t.Fatalf("operation %d (%s) failed with %v, then a restart: %v", n, hit, cause, err)
		}
	}
}

// One operation fails, the program goes on, and the power is lost some
// operations later: what the failed one left undone must not be built upon.
func TestFailThenCrash(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 8))
	some := func(string) bool { return r.IntN(2) == 0 }
	for n := 0; ; n += stride {
		hit := ""
		for range 2 {
			f := snaptest.NewFS()
			l, err := newLife(f)
			must(t, err)
			last := n + 1 + r.IntN(60)
			f.FailWith(func(op int, what string) error {
				switch {
				case op == n:
					hit = what
					return syscall.EIO
				case op >= last:
					return errPower
				}
				return nil
			})
			l.run()
			for _, c := range []*snaptest.FS{f.Crash(nil), f.Crash(some)} {
				if err := l.check(c); err != nil {
					t.Fatalf("operation %d (%s) failed, power lost before %d: %v", n, hit, last, err)
				}
			}
		}
		if hit == "" {
			return
		}
	}
}

// A failure is told: a Commit that could not sync is no success.
func TestCommitFailsWhenAnythingFails(t *testing.T) {
	for n := 0; ; n++ {
		f := snaptest.NewFS()
		l, err := newLife(f)
		must(t, err)
		hit := ""
		f.FailWith(func(op int, what string) error {
			if op == n {
				hit = what
				return syscall.EIO
			}
			return nil
		})
		err = l.tryCommit("a", "", change{data: pages(1)})
		f.FailWith(nil)
		if hit == "" {
			must(t, err)
			return
		}
		isErr(t, err, syscall.EIO)
		if ms, _ := l.s.Manifests(); len(ms) != 0 {
			t.Fatalf("%s failed, but the snapshot is there", hit)
		}
		if strings.HasPrefix(hit, "mkdir /store") && strings.Count(hit, "/") < 3 {
			continue // there was no store yet
		}
		for _, file := range f.Files() {
			if file != "/store/lock" {
				t.Fatalf("%s failed and left %s", hit, file)
			}
		}
	}
}

// The order of the file system's calls is the durability of the store: a lost
// sync must show as a difference here.
func TestCommitTranscript(t *testing.T) {
	f := snaptest.NewFS()
	l, err := newLife(f)
	must(t, err)
	must(t, l.tryCommit("a", "", change{data: pages(1)}))
	compareTranscript(t, f, `
mkdir /store
mkdir /store/images
mkdir /store/snapshots
syncdir /
syncdir /store
create /store/lock
mkdir /store/images/<1>
create /store/images/<1>/data
write /store/images/<1>/data 0 4096
write /store/images/<1>/data 4096 80
sync /store/images/<1>/data
create /store/images/<1>/header
write /store/images/<1>/header 0 168
sync /store/images/<1>/header
syncdir /store/images/<1>
syncdir /store/images
mkdir /store/snapshots/<2>
create /store/snapshots/<2>/state
write /store/snapshots/<2>/state 0 10
sync /store/snapshots/<2>/state
create /store/snapshots/<2>/manifest.json.tmp
write /store/snapshots/<2>/manifest.json.tmp 0 N
sync /store/snapshots/<2>/manifest.json.tmp
syncdir /store/snapshots/<2>
syncdir /store/snapshots
rename /store/snapshots/<2>/manifest.json.tmp /store/snapshots/<2>/manifest.json
syncdir /store/snapshots/<2>
`)
	must(t, l.s.Delete(bg, l.ids["a"]))
	_, err = l.s.GC(bg, nil, false)
	must(t, err)
	compareTranscript(t, f, `
remove /store/snapshots/<2>/manifest.json
syncdir /store/snapshots/<2>
remove /store/snapshots/<2>/state
remove /store/snapshots/<2>
syncdir /store/snapshots
remove /store/images/<1>/header
remove /store/images/<1>/data
remove /store/images/<1>
syncdir /store/images
`)
}

var idPattern = regexp.MustCompile(`[0-9a-f]{32}`)

func compareTranscript(t *testing.T, f *snaptest.FS, want string) {
	t.Helper()
	got := strings.Join(f.Transcript(), "\n")
	for i, id := range transcriptIDs(f, got) {
		got = strings.ReplaceAll(got, id, fmt.Sprintf("<%d>", i+1))
	}
	// Some lengths depend on the digits of clocks and on names of fields.
	got = regexp.MustCompile(`((?:manifest.json|compaction).tmp 0) \d+`).ReplaceAllString(got, "$1 N")
	if want = strings.TrimSpace(want); got != want {
		t.Errorf("transcript:\n%s\n\nwant:\n%s", got, want)
	}
}

// transcriptIDs returns the IDs in a transcript, images first.
func transcriptIDs(_ *snaptest.FS, text string) []string {
	var images, snapshots []string
	for line := range strings.Lines(text) {
		for _, id := range idPattern.FindAllString(line, 1) {
			if strings.Contains(line, "images") && !slices.Contains(images, id) {
				images = append(images, id)
			} else if strings.Contains(line, "snapshots") && !slices.Contains(snapshots, id) {
				snapshots = append(snapshots, id)
			}
		}
	}
	return append(images, snapshots...)
}
