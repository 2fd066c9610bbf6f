package pager

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// whole prepares the memory of a clone and returns the file it may map, or
// nothing.
func (r *rig) whole(id string, image format.ID) string {
	r.t.Helper()
	p, err := call(r.srv.PrepareMemory, &pagerv1.PrepareMemoryRequest{
		SandboxId: id, ImageId: image.String(), KeepWarm: true, Whole: true,
		Mode: pagerv1.MemoryMode_MEMORY_MODE_COPY, SocketPath: r.socket(id),
	})
	must(r.t, err)
	if _, err := os.Stat(r.socket(id)); (err == nil) != (p.WholePath == "") {
		r.t.Errorf("%s maps %q, and its socket: %v", id, p.WholePath, err)
	}
	return p.WholePath
}

// plenty is more than the pager keeps available.
const plenty = 1 << 30

func (r *rig) mounted() bool {
	r.t.Helper()
	m, err := isMounted(filepath.Join(r.dir, "memory"))
	must(r.t, err)
	return m
}

// mapped is the file as a VMM has it.
func mapped(t *testing.T, path string, size int) []byte {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	must(t, err)
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

func TestClonesMapAWholeImage(t *testing.T) {
	r := newRig(t, 4)
	r.free = plenty
	path := r.whole("a", r.image)
	if path == "" || r.whole("b", r.image) != path || r.whole("a", r.image) != path {
		t.Fatalf("the clones do not share a file: %q", path)
	}
	st, err := os.Stat(path)
	must(t, err)
	if st.Mode().Perm() != 0o444 || st.Size() != int64(len(r.content)) {
		t.Errorf("the file: %v", st)
	}
	var fs unix.Statfs_t
	must(t, unix.Statfs(path, &fs))
	if fs.Type != unix.TMPFS_MAGIC {
		t.Errorf("the file is not in RAM, but on %#x", fs.Type)
	}
	if s := r.stats("a"); !s.Attached || s.SharedResidentBytes != 3<<20 {
		t.Errorf("%v, want 3 MiB: the fourth is of zeros", s)
	}
	if _, err := call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: "a", Pid: int32(os.Getpid())}); err == nil {
		t.Error("something was attached to it")
	}
	mem := mapped(t, path, len(r.content))
	if !bytes.Equal(mem, r.content) {
		t.Error("the file differs from the image")
	}
	r.release("a")
	// Pages of an image that somebody maps are never taken out: they would be
	// zeros.
	if n, err := r.srv.evict(1 << 40); err != nil || n != 0 {
		t.Errorf("%d bytes of an image in use were given back (%v)", n, err)
	}
	r.release("b")
	if !r.mounted() || r.whole("c", r.image) != path {
		t.Error("the image was not kept for the next clone")
	}
	r.release("c")
	if n, err := r.srv.evict(1); err != nil || n < 3<<20 || r.mounted() {
		t.Errorf("%d bytes of an unused image were given back (%v); mounted: %v", n, err, r.mounted())
	}
	if !bytes.Equal(mem, r.content) {
		t.Error("who still maps the file has lost pages")
	}
}

// TestTheNextPagerFindsWholeImages, and removes those of nobody.
func TestTheNextPagerFindsWholeImages(t *testing.T) {
	r := newRig(t, 4)
	r.free = plenty
	path := r.whole("a", r.image)
	other, _ := r.newImage(4, 7)
	stale := r.whole("b", other)
	must(t, os.WriteFile(path+".tmp", nil, 0o600)) // of one that was being made
	must(t, removeRecord(filepath.Join(r.dir, "run"), "b"))
	r.start() // the one before is as good as killed
	if s := r.stats("a"); !s.Attached || s.SharedResidentBytes != 3<<20 {
		t.Errorf("taken up: %v", s)
	}
	for _, p := range []string{stale, path + ".tmp"} {
		if _, err := os.Stat(p); !os.IsNotExist(err) {
			t.Errorf("%s: %v", p, err)
		}
	}
	if r.whole("c", r.image) != path {
		t.Error("the next clone does not share the file")
	}
	if !bytes.Equal(mapped(t, path, len(r.content)), r.content) {
		t.Error("the file differs from the image")
	}
	r.release("a")
	r.release("c")
	must(t, r.srv.LetGo())
	if r.mounted() || len(r.files()) != 0 {
		t.Errorf("left: %v; mounted: %v", r.files(), r.mounted())
	}
	r.start() // nothing to find
}

// TestTheNextPagerTakesUpWhatCopiesDoNotMap: a clone that began to copy pages
// before its image was whole.
func TestTheNextPagerTakesUpWhatCopiesDoNotMap(t *testing.T) {
	r := newRig(t, 4)
	r.free = plenty
	path := r.whole("a", r.image)
	v := r.copied("b")
	v.wantSum(r.content) // the handover is taken
	r.release("a")
	r.start() // the one before is as good as killed
	if _, err := os.Stat(path); err != nil {
		t.Fatal("the file is gone, which the next clone would map:", err)
	}
	v.wantSum(r.content)
	r.release("b")
	must(t, r.srv.LetGo())
	if r.mounted() || len(r.files()) != 0 {
		t.Errorf("left: %v; mounted: %v", r.files(), r.mounted())
	}
}

// TestWhatCannotBeWholeIsCopied: a bad block, no room, no time.
func TestWhatCannotBeWholeIsCopied(t *testing.T) {
	t.Run("a damaged image", func(t *testing.T) {
		r := newRig(t, 2)
		r.free = plenty
		r.damage(100*4096 + 7)
		if path := r.whole("a", r.image); path != "" {
			t.Errorf("it is mapped from %s", path)
		}
		if r.mounted() {
			t.Error("something of it is left")
		}
		r.release("a")
	})
	t.Run("no memory", func(t *testing.T) {
		r := newRig(t, 4)
		r.free = 4<<20 + 2<<20 - 1
		if path := r.whole("a", r.image); path != "" {
			t.Errorf("it is mapped from %s", path)
		}
		r.free++ // the next clone is asked for anew
		if path := r.whole("b", r.image); path == "" {
			t.Error("it is not mapped, with room for it")
		}
		r.release("a")
		r.release("b")
	})
	t.Run("a large image, until it is whole", func(t *testing.T) {
		r := newRig(t, 4)
		r.free = plenty
		r.srv.images.wholes.wait = 1
		first := r.whole("a", r.image) // by chance it may be whole already
		<-r.srv.images.byID[r.image].whole.done
		if path := r.whole("b", r.image); path == "" || first != "" && first != path {
			t.Errorf("mapped from %q, then %q", first, path)
		}
		r.release("a")
		r.release("b")
	})
	t.Run("not wanted", func(t *testing.T) {
		r := newRig(t, 4)
		r.free = plenty
		r.prepareCopy("a")
		r.release("a")
		if r.mounted() {
			t.Error("it was made whole")
		}
		_, err := call(r.srv.PrepareMemory, &pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: r.image.String(), Whole: true})
		wantCode(t, err, connect.CodeInvalidArgument, "whole")
	})
}
