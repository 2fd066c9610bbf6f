package remote_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/remote"
	"git.omukk.dev/wrenn/sandbox/snapshot/snaptest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage/s3"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage/storagetest"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage/zstd"
)

const blockSize = format.BlockSize

var bg = context.Background()

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func pages(fill ...byte) []byte {
	var b []byte
	for _, f := range fill {
		b = append(b, bytes.Repeat([]byte{f}, blockSize)...)
	}
	return b
}

func openStore(t testing.TB, f storage.FS) *snapshot.Store {
	t.Helper()
	s, err := snapshot.Open("/store", snapshot.Options{FS: f})
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// commit makes a snapshot of a memory image, a disk image and a state.
func commit(t testing.TB, s *snapshot.Store, parent format.ID, memory []byte) format.ID {
	t.Helper()
	var m snapshot.Manifest
	if !parent.IsZero() {
		var err error
		m, err = s.Manifest(parent)
		must(t, err)
	}
	txn, err := s.Begin()
	must(t, err)
	defer txn.Abort()
	image := func(parent format.ID, content []byte) format.ID {
		var base *snapshot.Image
		if !parent.IsZero() {
			base, err = s.OpenImage(parent)
			must(t, err)
			defer base.Close()
		}
		w, err := s.NewImage(int64(len(content)), base)
		must(t, err)
		for off := 0; off < len(content); off += blockSize {
			p := content[off : off+blockSize]
			if base != nil {
				old := make([]byte, blockSize)
				_, err := base.ReadAt(old, int64(off))
				must(t, err)
				if bytes.Equal(old, p) {
					continue
				}
			}
			must(t, w.WriteAt(p, int64(off)))
		}
		id, err := w.Finish(bg)
		must(t, err)
		t.Cleanup(func() { _ = w.Abort() })
		return id
	}
	st, err := txn.StateFile()
	must(t, err)
	_, err = st.Write([]byte("device state"))
	must(t, err)
	must(t, txn.Commit(bg, snapshot.Manifest{
		Kind: snapshot.KindSnapshot, Name: "warm",
		Memory: snapshot.ImageRef{ID: image(m.Memory.ID, memory)},
		Disk:   snapshot.ImageRef{ID: image(m.Disk.ID, pages(9, 0, 9))},
	}))
	return txn.ID()
}

func readMemory(s *snapshot.Store, id format.ID) ([]byte, error) {
	m, err := s.Manifest(id)
	if err != nil {
		return nil, err
	}
	img, err := s.OpenImage(m.Memory.ID)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	b := make([]byte, img.Size())
	n, err := img.ReadAt(b, 0)
	return b[:n], err
}

func check(t testing.TB, s *snapshot.Store, id format.ID, want []byte, when string) {
	t.Helper()
	got, err := readMemory(s, id)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%s: %d bytes, %v, equal %v", when, len(got), err, bytes.Equal(got, want))
	}
	if problems, err := s.Verify(bg, nil); err != nil || len(problems) > 0 {
		t.Fatalf("%s: %v, %v", when, problems, err)
	}
}

// life publishes a parent and a child, opens both where they are and imports
// the child elsewhere.
func life(t *testing.T, o storage.Objects) {
	s := openStore(t, snaptest.NewFS())
	memory := map[format.ID][]byte{}
	parent := commit(t, s, format.ID{}, pages(1, 2, 0, 4))
	memory[parent] = pages(1, 2, 0, 4)
	child := commit(t, s, parent, pages(1, 0, 3, 4))
	memory[child] = pages(1, 0, 3, 4)

	var last, total int64
	r, err := remote.Publish(bg, s, parent, o, remote.PublishOptions{Progress: func(done, all int64) { last, total = done, all }})
	must(t, err)
	if !r.Manifest || r.Sent != r.Files || r.Files != 5 || r.SentBytes != r.Bytes || last != r.Bytes || total != last {
		t.Errorf("first Publish: %+v, progress %d of %d", r, last, total)
	}
	r, err = remote.Publish(bg, s, child, o, remote.PublishOptions{})
	must(t, err)
	if !r.Manifest || r.Sent >= r.Files {
		t.Errorf("Publish of the child sent what was there: %+v", r)
	}
	r, err = remote.Publish(bg, s, child, o, remote.PublishOptions{})
	must(t, err)
	if r.Manifest || r.Sent != 0 {
		t.Errorf("the second Publish sent %+v", r)
	}

	there, err := remote.Open(bg, o)
	must(t, err)
	for id, want := range memory {
		check(t, there, id, want, "in the object store")
	}
	if ms, errs := there.Manifests(); len(ms) != 2 || len(errs) != 0 {
		t.Errorf("Manifests = %v, %v", ms, errs)
	}
	if _, err := there.Begin(); !errors.Is(err, snapshot.ErrReadOnly) {
		t.Errorf("Begin: %v", err)
	}
	if _, err := there.Manifest(format.NewID()); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("Manifest of an unknown snapshot: %v", err)
	}
	into := openStore(t, snaptest.NewFS())
	must(t, remote.Import(bg, o, child, into))
	check(t, into, child, memory[child], "imported")
	if _, err := into.StatePath(child); err != nil {
		t.Error(err)
	}
}

func TestPublishOpenImport(t *testing.T) {
	t.Run("memory", func(t *testing.T) { life(t, storagetest.NewMemory()) })
	t.Run("files", func(t *testing.T) {
		o, err := storage.NewFiles(nil, t.TempDir())
		must(t, err)
		life(t, o)
	})
	t.Run("compressed", func(t *testing.T) {
		m := storagetest.NewMemory()
		stack, err := storage.NewStack(m, storage.StackOptions{
			Encode: func(o storage.Objects) (storage.Objects, error) {
				return zstd.New(o, zstd.Options{TempDir: t.TempDir(), Immutable: remote.Immutable})
			},
			Cache: storage.CacheOptions{Dir: t.TempDir(), Cacheable: remote.Immutable},
		})
		must(t, err)
		defer stack.Close()
		life(t, stack)
		there, err := remote.Open(bg, m)
		must(t, err)
		if ms, _ := there.Manifests(); len(ms) != 0 {
			t.Error("manifests are stored as they are")
		}
	})
	t.Run("S3 with all decorators", func(t *testing.T) {
		server := storagetest.StartS3(t)
		o, err := s3.New(s3.Options{Endpoint: server.Endpoint, Bucket: "snapshots", Prefix: "host-1/", AccessKey: server.AccessKey, SecretKey: server.SecretKey})
		must(t, err)
		must(t, o.MakeBucket(bg))
		stack, err := storage.NewStack(o, storage.StackOptions{Cache: storage.CacheOptions{Dir: t.TempDir(), Cacheable: remote.Immutable}})
		must(t, err)
		defer stack.Close()
		life(t, stack)
		before := stack.Cache.Stats()
		there, err := remote.Open(bg, stack)
		must(t, err)
		problems, err := there.Verify(bg, nil)
		must(t, err)
		if after := stack.Cache.Stats(); len(problems) > 0 || after.Fetched != before.Fetched {
			t.Errorf("reading it all again fetched %d bytes, %v", after.Fetched-before.Fetched, problems)
		}
	})
}

// Publish is cut off at every call, before it was done and after: the snapshot
// is there whole or not at all, and the next Publish finishes.
func TestPublishIsCutOffAtEveryCall(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	want := pages(1, 2, 0, 4)
	id := commit(t, s, format.ID{}, want)
	for _, after := range []bool{false, true} {
		for n := 0; ; n++ {
			m := storagetest.NewMemory()
			o := storagetest.NewFaulty(m)
			lost := errors.New("the network is gone")
			o.FailWith(func(i int, _ string) *storagetest.Fault {
				if i < n {
					return nil
				}
				return &storagetest.Fault{Err: lost, After: after && i == n}
			})
			_, err := remote.Publish(bg, s, id, o, remote.PublishOptions{Concurrent: 1})
			if err != nil && !errors.Is(err, lost) {
				t.Fatalf("call %d: %v", n, err)
			}
			there, oerr := remote.Open(bg, m)
			must(t, oerr)
			_, merr := there.Manifest(id)
			switch {
			case merr == nil:
				check(t, there, id, want, fmt.Sprintf("cut off at call %d", n))
			case err == nil || !errors.Is(merr, snapshot.ErrNotFound):
				t.Fatalf("cut off at call %d: Publish %v, Manifest %v", n, err, merr)
			}
			had := len(m.Keys())
			o.FailWith(nil)
			r, perr := remote.Publish(bg, s, id, o, remote.PublishOptions{})
			must(t, perr)
			if r.Sent != r.Files-min(had, r.Files) {
				t.Fatalf("cut off at call %d with %d objects there, the next Publish sent %d of %d", n, had, r.Sent, r.Files)
			}
			check(t, there, id, want, "after the next Publish")
			if err == nil {
				break
			}
		}
	}
}

// The manifest is the last object, whatever is sent side by side.
func TestTheManifestIsPublishedLast(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	id := commit(t, s, format.ID{}, pages(1, 2))
	o := storagetest.NewFaulty(storagetest.NewMemory())
	_, err := remote.Publish(bg, s, id, o, remote.PublishOptions{})
	must(t, err)
	puts := slices.DeleteFunc(o.Calls(), func(c string) bool { return !strings.HasPrefix(c, "put ") })
	if last := puts[len(puts)-1]; len(puts) != 6 || !strings.HasSuffix(last, "/manifest.json") {
		t.Errorf("the puts are %q", puts)
	}
}

// Damage here is not carried there.
func TestPublishRefusesDamage(t *testing.T) {
	f := snaptest.NewFS()
	s := openStore(t, f)
	id := commit(t, s, format.ID{}, pages(1, 2, 3))
	for _, name := range f.Files() {
		b := f.Content(name)
		if len(b) == 0 {
			continue // the lock
		}
		b[len(b)/2] ^= 1
		m := storagetest.NewMemory()
		_, err := remote.Publish(bg, s, id, m, remote.PublishOptions{})
		var c *snapshot.CorruptError
		if !errors.As(err, &c) {
			t.Errorf("%s damaged: %v", name, err)
		}
		for _, k := range m.Keys() {
			if strings.HasSuffix(name, k) || strings.HasSuffix(k, "/manifest.json") {
				t.Errorf("%s damaged, and %s was published", name, k)
			}
		}
		b[len(b)/2] ^= 1
	}
}

// Every call on the way of a lazy read fails, is cut short or returns a flipped
// bit: the reader gets an error or the right bytes, never others.
func TestLazyReadsAreRightOrFail(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	want := pages(1, 2, 3, 4, 5)
	id := commit(t, s, format.ID{}, want)
	m := storagetest.NewMemory()
	_, err := remote.Publish(bg, s, id, m, remote.PublishOptions{})
	must(t, err)
	for name, fault := range map[string]*storagetest.Fault{
		"lost":      {Err: storage.NewObjectError("any", "k", nil, errors.New("lost"))},
		"missing":   {Err: storage.NewObjectError("any", "k", fs.ErrNotExist, fs.ErrNotExist)},
		"short":     {Short: 10},
		"corrupted": {Corrupt: true},
	} {
		for n := 0; ; n++ {
			o := storagetest.NewFaulty(m)
			hit := ""
			o.FailWith(func(i int, call string) *storagetest.Fault {
				if i == n {
					hit = call
					return fault
				}
				return nil
			})
			there, err := remote.Open(bg, o)
			must(t, err)
			got, err := readMemory(there, id)
			if hit == "" {
				must(t, err)
				break
			}
			if err == nil && !bytes.Equal(got, want) {
				t.Fatalf("%s: call %d (%s): other bytes", name, n, hit)
			}
			if !bytes.Equal(got, want[:len(got)]) {
				t.Fatalf("%s: call %d (%s): a wrong byte among the first %d", name, n, hit, len(got))
			}
			if err == nil && !(strings.HasPrefix(hit, "head") && name != "lost" && name != "missing") {
				t.Fatalf("%s: call %d (%s): nobody was told", name, n, hit)
			}
			into := openStore(t, snaptest.NewFS())
			o.FailWith(func(i int, call string) *storagetest.Fault {
				if i == n {
					return fault
				}
				return nil
			})
			if err := remote.Import(bg, o, id, into); err == nil {
				check(t, into, id, want, "imported beside a fault")
			} else if _, merr := into.Manifest(id); !errors.Is(merr, snapshot.ErrNotFound) {
				t.Fatalf("%s: call %d: a failed import left %v", name, n, merr)
			}
		}
	}
}

// The faults of a bad network pass: with the decorators a life goes through.
func TestABadNetworkIsSurvived(t *testing.T) {
	s := openStore(t, snaptest.NewFS())
	want := pages(1, 2, 3)
	id := commit(t, s, format.ID{}, want)
	o := storagetest.NewFaulty(storagetest.NewMemory())
	o.FailWith(func(i int, _ string) *storagetest.Fault {
		switch i % 4 {
		case 0:
			return &storagetest.Fault{Err: storage.NewObjectError("any", "k", storage.ErrTransient, errors.New("reset")), After: i%8 == 0}
		case 1:
			return &storagetest.Fault{Err: &storage.ObjectError{Op: "any", Class: storage.ErrThrottled}}
		case 2:
			return &storagetest.Fault{Short: 100}
		}
		return nil
	})
	stack, err := storage.NewStack(o, storage.StackOptions{
		Retry: storage.RetryOptions{Attempts: 20, Sleep: func(context.Context, time.Duration) error { return nil }},
		Cache: storage.CacheOptions{Dir: t.TempDir(), Cacheable: remote.Immutable},
	})
	must(t, err)
	defer stack.Close()
	_, err = remote.Publish(bg, s, id, stack, remote.PublishOptions{})
	must(t, err)
	into := openStore(t, snaptest.NewFS())
	must(t, remote.Import(bg, stack, id, into))
	check(t, into, id, want, "imported")
}
