package pager

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
)

func TestSharedMemoryFromPrepareToRelease(t *testing.T) {
	r := newRig(t, 4)
	a, b := r.shared("a"), r.shared("b")
	a.wantSum(r.content)
	a.do("poke 5 77")
	b.wantSum(r.content)
	if st := r.stats("a"); !st.Attached || st.Faults == 0 || st.BytesFilled != 3<<20 || st.SharedResidentBytes != 3<<20 {
		t.Errorf("first clone: %v", st)
	}
	if st := r.stats("b"); st.BytesFilled != 0 {
		t.Errorf("second clone: %v", st)
	}
	s, err := call(r.srv.GetStatus, &pagerv1.GetStatusRequest{})
	must(t, err)
	if slices.Sort(s.Sandboxes); !slices.Equal(s.Sandboxes, []string{"a", "b"}) {
		t.Errorf("status lists %v", s.Sandboxes)
	}
	for id, v := range map[string]*vmmProc{"a": a, "b": b} {
		v.kill()
		r.release(id)
		r.release(id) // says the same again
		_, err := call(r.srv.GetStats, &pagerv1.GetStatsRequest{SandboxId: id})
		wantCode(t, err, connect.CodeNotFound, id)
	}
	after, err := call(r.srv.GetStatus, &pagerv1.GetStatusRequest{})
	must(t, err)
	if was, now := s.Totals, after.Totals; was.Faults == 0 || was.FilledBytes != 3<<20 || now.Faults < was.Faults || now.FilledBytes != 3<<20 {
		t.Errorf("totals %v while they ran, %v when they are gone", was, now)
	}
	if f := r.files(); len(f) != 0 {
		t.Errorf("left behind: %v", f)
	}
	if len(r.srv.images.byID) != 0 {
		t.Error("an image is still open")
	}
}

func TestCopiedMemoryFromPrepareToRelease(t *testing.T) {
	r := newRig(t, 4)
	a, b := r.copied("a"), r.copied("b")
	want := slices.Clone(r.content)
	a.do("remove %d %d", 3*4096, 20*4096)
	clear(want[3*4096 : 23*4096])
	a.wantSum(want)
	b.wantSum(r.content)
	if st := r.stats("a"); !st.Attached || st.Faults == 0 || st.BytesFilled == 0 || st.SharedResidentBytes != 0 {
		t.Errorf("%v", st)
	}
	for id, v := range map[string]*vmmProc{"a": a, "b": b} {
		v.kill()
		r.release(id)
		if _, err := os.Stat(r.socket(id)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("socket of %s: %v", id, err)
		}
	}
	if f := r.files(); len(f) != 0 {
		t.Errorf("left behind: %v", f)
	}
}

func TestManySandboxesAtOnce(t *testing.T) {
	r := newRig(t, 2)
	var wg sync.WaitGroup
	for i := range 6 {
		id := fmt.Sprintf("s%d", i)
		var v *vmmProc
		if i%2 == 0 {
			r.prepareCopy(id)
		} else {
			path := r.prepare(id)
			v = startVMM(t)
			v.do("share %s %d", path, len(r.content))
		}
		if v == nil {
			v = startVMM(t)
		}
		wg.Go(func() {
			if _, err := call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: id, Pid: int32(v.pid())}); err != nil {
				t.Error(err)
				return
			}
			if i%2 == 0 {
				v.send("handover %s %d 0", r.socket(id), len(r.content))
				if s, err := v.answer(); s != "ok" {
					t.Errorf("%s: %q, %v", id, s, err)
				}
			}
			v.send("peek %d", 1<<20+8*i)
			if s, err := v.answer(); s != fmt.Sprint(r.content[1<<20+8*i]) {
				t.Errorf("%s: page reads %q, %v", id, s, err)
			}
			v.kill()
			if _, err := call(r.srv.ReleaseMemory, &pagerv1.ReleaseMemoryRequest{SandboxId: id}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if f := r.files(); len(f) != 0 {
		t.Errorf("left behind: %v", f)
	}
}

func TestBadMemoryRequests(t *testing.T) {
	r := newRig(t, 1)
	image := r.image.String()
	const copying = pagerv1.MemoryMode_MEMORY_MODE_COPY
	for _, tc := range []struct {
		req  *pagerv1.PrepareMemoryRequest
		code connect.Code
		text string
	}{
		{&pagerv1.PrepareMemoryRequest{ImageId: image}, connect.CodeInvalidArgument, "sandbox_id"},
		{&pagerv1.PrepareMemoryRequest{SandboxId: "../x", ImageId: image}, connect.CodeInvalidArgument, "sandbox_id"},
		{&pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: "xyz"}, connect.CodeInvalidArgument, "image_id"},
		{&pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: strings.Repeat("1", 32)}, connect.CodeNotFound, "image"},
		{&pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: image, Mode: 7}, connect.CodeInvalidArgument, "mode 7"},
		{&pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: image, SocketPath: "/x"}, connect.CodeInvalidArgument, "socket_path"},
		{&pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: image, Mode: copying}, connect.CodeInvalidArgument, "socket_path"},
		{&pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: image, Mode: copying, SocketPath: "a/b"}, connect.CodeInvalidArgument, "socket_path"},
		{&pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: image, Mode: copying, SocketPath: "/a/../b"}, connect.CodeInvalidArgument, "socket_path"},
		{&pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: image, Mode: copying, SocketPath: "/" + strings.Repeat("x", 107)}, connect.CodeInvalidArgument, "socket_path"},
	} {
		_, err := call(r.srv.PrepareMemory, tc.req)
		wantCode(t, err, tc.code, tc.text)
	}
	if f := r.files(); len(f) != 0 || len(r.srv.guests) != 0 || len(r.srv.images.byID) != 0 {
		t.Errorf("left behind: %v, %d sandboxes, %d images", f, len(r.srv.guests), len(r.srv.images.byID))
	}
	_, err := call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: "a", Pid: 5})
	wantCode(t, err, connect.CodeFailedPrecondition, "not prepared")
	r.prepare("a")
	r.prepare("a") // says the same again
	other, _ := r.newImage(1, 9)
	_, err = call(r.srv.PrepareMemory, &pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: other.String()})
	wantCode(t, err, connect.CodeAlreadyExists, "release it first")
	_, err = call(r.srv.PrepareMemory, &pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: image, Mode: copying, SocketPath: "/x"})
	wantCode(t, err, connect.CodeAlreadyExists, "release it first")
	for _, pid := range []int32{0, 1, -5} {
		_, err = call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: "a", Pid: pid})
		wantCode(t, err, connect.CodeInvalidArgument, "pid")
	}
	v := startVMM(t) // maps nothing
	_, err = call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: "a", Pid: int32(v.pid())})
	wantCode(t, err, connect.CodeInternal, "does not map")
	v.kill()
	_, err = call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: "a", Pid: int32(v.pid())})
	wantCode(t, err, connect.CodeInternal, "gone")
	r.prepareCopy("c")
	_, err = call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: "c", Pid: int32(v.pid())})
	wantCode(t, err, connect.CodeInternal, "gone")
	w := startVMM(t)
	r.expect("c", w)
	r.expect("c", w) // says the same again
	_, err = call(r.srv.AttachMemory, &pagerv1.AttachMemoryRequest{SandboxId: "c", Pid: int32(os.Getpid())})
	wantCode(t, err, connect.CodeAlreadyExists, "waits for process")
	for _, id := range []string{"a", "c"} {
		r.release(id)
	}
	_, err = call(r.srv.DropImage, &pagerv1.DropImageRequest{ImageId: "?"})
	wantCode(t, err, connect.CodeInvalidArgument, "image_id")
	if f := r.files(); len(f) != 0 {
		t.Errorf("left behind: %v", f)
	}
}

func TestWarmImagesStayUntilDropped(t *testing.T) {
	r := newRig(t, 2)
	_, err := call(r.srv.PrepareMemory, &pagerv1.PrepareMemoryRequest{SandboxId: "a", ImageId: r.image.String(), KeepWarm: true})
	must(t, err)
	v := r.shared("a")
	v.wantSum(r.content)
	v.kill()
	r.release("a")
	v = r.shared("b")
	v.wantSum(r.content)
	if st := r.stats("b"); st.BytesFilled != 0 {
		t.Errorf("a clone of a warm image filled %d bytes", st.BytesFilled)
	}
	_, err = call(r.srv.DropImage, &pagerv1.DropImageRequest{ImageId: r.image.String()}) // in use: when it ends
	must(t, err)
	v.kill()
	r.release("b")
	if len(r.srv.images.byID) != 0 {
		t.Error("a dropped image is still open")
	}
}

// damage flips a byte of the image's data.
func (r *rig) damage(off int64) {
	r.t.Helper()
	path := filepath.Join(r.dir, "store", "images", r.image.String(), "data")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(r.t, err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], off)
	must(r.t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], off)
	must(r.t, err)
}

func TestDamagedImageKillsTheVMWithTheReason(t *testing.T) {
	for name, start := range map[string]func(r *rig, id string) *vmmProc{
		"shared": func(r *rig, id string) *vmmProc { return r.shared(id) },
		"copied": func(r *rig, id string) *vmmProc { return r.copied(id) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 2)
			r.damage(100*4096 + 7)
			v := start(r, "a")
			if got := v.do("peek %d", 101*4096); got != fmt.Sprint(r.content[101*4096]) {
				t.Errorf("page beside the damaged one reads %s", got)
			}
			v.send("peek %d", 100*4096)
			if s, err := v.answer(); err == nil {
				t.Fatalf("the damaged page was read as %q", s)
			}
			<-v.done
			// The report comes after the kill, from a goroutine of its own.
			for r.stats("a").Fatal == "" {
				unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
			}
			if st := r.stats("a"); !strings.Contains(st.Fatal, "checksum") {
				t.Errorf("reason is %q", st.Fatal)
			}
			r.release("a")
			_, err := call(r.srv.GetStats, &pagerv1.GetStatsRequest{SandboxId: "a"})
			wantCode(t, err, connect.CodeNotFound, "a")
		})
	}
}

func TestBadHandoverKillsTheVMWithTheReason(t *testing.T) {
	r := newRig(t, 1)
	r.prepareCopy("a")
	v := startVMM(t)
	r.expect("a", v)
	v.send("handover %s %d 4096", r.socket("a"), len(r.content))
	<-v.done
	for r.stats("a").Fatal == "" {
		unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
	}
	if st := r.stats("a"); st.Attached || !strings.Contains(st.Fatal, "outside the image") {
		t.Errorf("%v", st)
	}
	r.release("a")
	if f := r.files(); len(f) != 0 {
		t.Errorf("left behind: %v", f)
	}
}

func TestReleaseBeforeTheHandover(t *testing.T) {
	r := newRig(t, 1)
	r.prepareCopy("a")
	v := startVMM(t)
	r.expect("a", v)
	r.release("a")
	v.send("handover %s %d 0", r.socket("a"), len(r.content))
	if s, _ := v.answer(); !strings.Contains(s, "no such file") {
		t.Errorf("hand-over to a closed socket: %q", s)
	}
	// And again under the same name.
	v = r.copied("a")
	v.wantSum(r.content)
}
