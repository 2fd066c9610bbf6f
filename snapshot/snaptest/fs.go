// Package snaptest has what tests of the snapshot engine need: a file system
// that records every call, fails the operation of your choice and can lose
// what was not synced; and the conformance suite for storage.FS.
//
// Tests of any package may import it; production code must not.
package snaptest

import (
	"fmt"
	"io/fs"
	"path"
	"sort"
	"strings"
	"sync"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// FS is a file system in memory with the durability of a careless disk: of a
// file only the content at its last Sync, of a directory only the names at its
// last SyncDir survive a Crash. Names are absolute; "/" exists.
type FS struct {
	mu    sync.Mutex
	root  *node
	boot  string
	log   []string
	ops   int
	fail  func(op int, what string) error
	locks map[*node]*file
}

var _ storage.FS = (*FS)(nil)

// node is a file or a directory, now and as it would be after a crash.
type node struct {
	dir     bool
	data    []byte
	synced  []byte
	entries map[string]*node
	durable map[string]*node
}

func newDir() *node {
	return &node{dir: true, entries: map[string]*node{}, durable: map[string]*node{}}
}

// NewFS returns an empty file system.
func NewFS() *FS {
	return &FS{root: newDir(), boot: "boot-1", locks: map[*node]*file{}}
}

// FailWith has f called before each changing operation (create, mkdir, rename,
// remove, write, truncate, punch, sync, syncdir), numbered from 0 since the
// call of FailWith; what it returns is what the operation fails with. A failed
// write of more than one byte leaves half of its bytes behind. nil ends it.
func (f *FS) FailWith(fn func(op int, what string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ops, f.fail = 0, fn
}

// Ops returns the number of changing operations since FailWith or the start.
func (f *FS) Ops() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ops
}

// Transcript returns the changing operations since it was last called.
func (f *FS) Transcript() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.log
	f.log = nil
	return l
}

// Crash returns the file system as the next boot finds it. For each file's
// unsynced content and each unsynced change of a name, survives says whether
// the disk happened to have it; nil loses all of it. The old one is unchanged.
func (f *FS) Crash(survives func(name string) bool) *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	if survives == nil {
		survives = func(string) bool { return false }
	}
	c := NewFS()
	c.boot = f.boot + "+"
	c.root = crash(f.root, "/", survives, map[*node]*node{})
	return c
}

// Restart returns the file system as the next process finds it when only the
// process died: everything is there, nothing is locked.
func (f *FS) Restart() *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := NewFS()
	c.boot = f.boot
	c.root = clone(f.root, map[*node]*node{})
	return c
}

func crash(n *node, name string, survives func(string) bool, done map[*node]*node) *node {
	if c := done[n]; c != nil {
		return c
	}
	if !n.dir {
		b := n.synced
		if survives(name) {
			b = n.data
		}
		c := &node{data: append([]byte(nil), b...), synced: append([]byte(nil), b...)}
		done[n] = c
		return c
	}
	c := newDir()
	done[n] = c
	movedTo := map[*node]string{}
	for e, child := range n.entries {
		movedTo[child] = e
	}
	kept := map[string]bool{}
	for _, e := range names(n.entries, n.durable) {
		child := n.durable[e]
		if child != n.entries[e] {
			// A rename survives whole or not at all: one decision for both names.
			key := e
			if to, ok := movedTo[child]; ok && child != nil {
				key = to
			}
			if _, ok := kept[key]; !ok {
				kept[key] = survives(path.Join(name, key) + " (name)")
			}
			if kept[key] {
				child = n.entries[e]
			}
		}
		if child != nil {
			c.entries[e] = crash(child, path.Join(name, e), survives, done)
			c.durable[e] = c.entries[e]
		}
	}
	return c
}

func clone(n *node, done map[*node]*node) *node {
	if n == nil {
		return nil
	}
	if c := done[n]; c != nil {
		return c
	}
	c := &node{dir: n.dir, data: append([]byte(nil), n.data...), synced: append([]byte(nil), n.synced...)}
	done[n] = c
	if n.dir {
		c.entries, c.durable = map[string]*node{}, map[string]*node{}
		for e, child := range n.entries {
			c.entries[e] = clone(child, done)
		}
		for e, child := range n.durable {
			c.durable[e] = clone(child, done)
		}
	}
	return c
}

func names(maps ...map[string]*node) []string {
	seen := map[string]bool{}
	var out []string
	for _, m := range maps {
		for e := range m {
			if !seen[e] {
				seen[e] = true
				out = append(out, e)
			}
		}
	}
	sort.Strings(out)
	return out
}

// Files returns the names of all files that exist now, sorted.
func (f *FS) Files() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	var walk func(n *node, name string)
	walk = func(n *node, name string) {
		if !n.dir {
			out = append(out, name)
			return
		}
		for _, e := range names(n.entries) {
			walk(n.entries[e], path.Join(name, e))
		}
	}
	walk(f.root, "/")
	return out
}

// Content returns the bytes of a file as they are: changing them damages it.
func (f *FS) Content(name string) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.find("read", name)
	if err != nil {
		return nil
	}
	return n.data
}

// begin counts, records and possibly fails a changing operation.
func (f *FS) begin(what string, args ...any) error {
	line := what
	for _, a := range args {
		line += fmt.Sprintf(" %v", a)
	}
	op := f.ops
	f.ops++
	if f.fail != nil {
		if err := f.fail(op, line); err != nil {
			f.log = append(f.log, line+" = "+err.Error())
			return &fs.PathError{Op: what, Path: fmt.Sprint(args...), Err: err}
		}
	}
	f.log = append(f.log, line)
	return nil
}

func (f *FS) find(op, name string) (*node, error) {
	n := f.root
	for _, e := range strings.Split(strings.Trim(path.Clean(name), "/"), "/") {
		if e == "" {
			continue
		}
		if !n.dir || n.entries[e] == nil {
			return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
		}
		n = n.entries[e]
	}
	return n, nil
}

func (f *FS) parent(op, name string) (*node, string, error) {
	dir, base := path.Split(path.Clean(name))
	d, err := f.find(op, dir)
	if err == nil && !d.dir {
		err = &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	return d, base, err
}

// add makes a node under a new name.
func (f *FS) add(op, name string, n *node) error {
	d, base, err := f.parent(op, name)
	if err != nil {
		return err
	}
	if d.entries[base] != nil {
		return &fs.PathError{Op: op, Path: name, Err: fs.ErrExist}
	}
	if err := f.begin(op, name); err != nil {
		return err
	}
	d.entries[base] = n
	return nil
}

// Create implements storage.FS.
func (f *FS) Create(name string) (storage.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := &node{}
	if err := f.add("create", name, n); err != nil {
		return nil, err
	}
	return &file{fs: f, n: n, name: name, rw: true}, nil
}

// Open implements storage.FS.
func (f *FS) Open(name string) (storage.File, error) { return f.open(name, false) }

// OpenRW implements storage.FS.
func (f *FS) OpenRW(name string) (storage.File, error) { return f.open(name, true) }

func (f *FS) open(name string, rw bool) (storage.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.find("open", name)
	if err != nil {
		return nil, err
	}
	if n.dir {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	return &file{fs: f, n: n, name: name, rw: rw}, nil
}

// Mkdir implements storage.FS.
func (f *FS) Mkdir(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.add("mkdir", name, newDir())
}

// Rename implements storage.FS.
func (f *FS) Rename(from, to string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, base, err := f.parent("rename", from)
	if err != nil {
		return err
	}
	if d.entries[base] == nil {
		return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
	}
	d2, base2, err := f.parent("rename", to)
	if err != nil {
		return err
	}
	if err := f.begin("rename", from, to); err != nil {
		return err
	}
	n := d.entries[base]
	delete(d.entries, base)
	d2.entries[base2] = n
	return nil
}

// Remove implements storage.FS.
func (f *FS) Remove(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, base, err := f.parent("remove", name)
	if err != nil {
		return err
	}
	n := d.entries[base]
	if n == nil {
		return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	if n.dir && len(n.entries) > 0 {
		return &fs.PathError{Op: "remove", Path: name, Err: fmt.Errorf("directory not empty: %w", fs.ErrInvalid)}
	}
	if err := f.begin("remove", name); err != nil {
		return err
	}
	delete(d.entries, base)
	return nil
}

// ReadDir implements storage.FS.
func (f *FS) ReadDir(name string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.find("readdir", name)
	if err != nil {
		return nil, err
	}
	return names(n.entries), nil
}

// SyncDir implements storage.FS.
func (f *FS) SyncDir(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.find("syncdir", name)
	if err != nil {
		return err
	}
	if err := f.begin("syncdir", name); err != nil {
		return err
	}
	n.durable = map[string]*node{}
	for e, child := range n.entries {
		n.durable[e] = child
	}
	return nil
}

// BootID implements storage.FS.
func (f *FS) BootID() (string, error) { return f.boot, nil }
