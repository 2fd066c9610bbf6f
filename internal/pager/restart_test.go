package pager

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
)

// restart ends the pager, records left as they are, and starts the next one.
func (r *rig) restart() {
	r.t.Helper()
	must(r.t, r.srv.Close())
	r.start()
}

func (r *rig) serveDisk(id string) string {
	r.t.Helper()
	socket := filepath.Join(r.dir, id+".nbd")
	d, err := call(r.srv.ServeDisk, &pagerv1.ServeDiskRequest{SandboxId: id, ImageId: r.image.String(), OverlayPath: filepath.Join(r.dir, id+".overlay"), SocketPath: socket})
	must(r.t, err)
	if d.Size != int64(len(r.content)) {
		r.t.Fatalf("disk of %d bytes", d.Size)
	}
	return socket
}

func TestNextPagerTakesUpEverything(t *testing.T) {
	r := newRig(t, 4)
	shared, copied := r.shared("s"), r.copied("c")
	socket := r.serveDisk("d")
	wantCopied, wantShared := slices.Clone(r.content), slices.Clone(r.content)
	copied.do("poke 100 7")
	wantCopied[100] = 7
	copied.do("remove %d %d", 5*4096, 30*4096)
	clear(wantCopied[5*4096 : 35*4096])
	shared.do("poke 4096 9")
	wantShared[4096] = 9
	for range 2 {
		r.restart()
		if st := r.stats("c"); !st.Attached || st.Fatal != "" {
			t.Errorf("copied: %v", st)
		}
	}
	shared.wantSum(wantShared)
	copied.wantSum(wantCopied)
	conn, err := net.Dial("unix", socket)
	must(t, err)
	b := make([]byte, 8)
	if _, err := conn.Read(b); err != nil || string(b) != "NBDMAGIC" {
		t.Errorf("the disk's server says %q, %v", b, err)
	}
	conn.Close()
	_, err = call(r.srv.StopDisk, &pagerv1.StopDiskRequest{SandboxId: "d"})
	must(t, err)
	if _, err := net.Dial("unix", socket); err == nil {
		t.Error("a stopped disk takes connections")
	}
	for id, v := range map[string]*vmmProc{"s": shared, "c": copied} {
		v.kill()
		r.release(id)
	}
	if f := r.files(); len(f) != 0 {
		t.Errorf("left behind: %v", f)
	}
}

// TestWhatIsServedCanBeAskedForWithoutRoom: the next engine asks for the disks of
// all that run, also where the record's disk takes nothing any more.
func TestWhatIsServedCanBeAskedForWithoutRoom(t *testing.T) {
	r := newRig(t, 1)
	r.serveDisk("d")
	// Where the record's new copy is to be written stands what cannot be replaced.
	must(t, os.Mkdir(filepath.Join(r.srv.opts.Dir, "d"+recordSuffix+".tmp"), 0o700))
	r.serveDisk("d")
	must(t, os.Remove(filepath.Join(r.srv.opts.Dir, "d"+recordSuffix+".tmp")))
	_, err := call(r.srv.StopDisk, &pagerv1.StopDiskRequest{SandboxId: "d"})
	must(t, err)
}

func TestNextPagerForgetsWhatEnded(t *testing.T) {
	r := newRig(t, 2)
	shared, copied := r.shared("s"), r.copied("c")
	r.prepare("p") // and no more
	r.prepareCopy("q")
	waiting := startVMM(t)
	r.prepareCopy("w")
	r.expect("w", waiting)
	must(t, r.srv.Close())
	for _, v := range []*vmmProc{shared, copied, waiting} {
		v.kill()
	}
	r.start()
	if f := r.files(); len(f) != 0 || len(r.srv.guests) != 0 {
		t.Errorf("left behind: %v, %d sandboxes", f, len(r.srv.guests))
	}
}

func TestNextPagerWaitsForTheHandover(t *testing.T) {
	r := newRig(t, 2)
	r.prepareCopy("a")
	v := startVMM(t)
	r.expect("a", v)
	r.restart()
	v.do("handover %s %d 0", r.socket("a"), len(r.content))
	v.wantSum(r.content)
}

// TestHandoverLostWithThePager: it was sent, and the pager that had it is gone.
func TestHandoverLostWithThePager(t *testing.T) {
	r := newRig(t, 2)
	r.prepareCopy("a")
	v := startVMM(t)
	r.expect("a", v)
	must(t, r.srv.Close())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket("a"), Net: "unix"})
	must(t, err)
	v.do("handover %s %d 0", r.socket("a"), len(r.content))
	l.Close()
	r.start()
	<-v.done
	if st := r.stats("a"); !strings.Contains(st.Fatal, "start the VM again") {
		t.Errorf("reason is %q", st.Fatal)
	}
}

// TestWhatCannotBeServedAgainIsKilled: it would stand still for ever, or read
// what it must not.
func TestWhatCannotBeServedAgainIsKilled(t *testing.T) {
	for name, tc := range map[string]struct {
		start func(r *rig) *vmmProc
		harm  func(r *rig)
		want  string
	}{
		"no page map": {func(r *rig) *vmmProc { return r.copied("a") }, func(r *rig) {
			must(r.t, os.Remove(pagesPath(r.srv.opts.Dir, "a")))
		}, "page map"},
		"other regions": {func(r *rig) *vmmProc { return r.copied("a") }, func(r *rig) {
			r.edit("a", func(rec *record) { rec.Memory.Attachment.Regions[0].Size -= 4096 })
		}, "regions hold"},
		"no image": {func(r *rig) *vmmProc { return r.shared("a") }, func(r *rig) {
			r.edit("a", func(rec *record) { rec.Memory.ImageID[0] ^= 1 })
		}, "open memory image"},
		"other address": {func(r *rig) *vmmProc { return r.shared("a") }, func(r *rig) {
			r.edit("a", func(rec *record) { rec.Memory.Attachment.Addr += 4096 })
		}, "recorded at"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 2)
			v := tc.start(r)
			v.do("peek 0")
			for !r.stats("a").Attached { // the hand-over's answer does not tell
				unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
			}
			must(t, r.srv.Close())
			tc.harm(r)
			r.start()
			<-v.done
			if st := r.stats("a"); !strings.Contains(st.Fatal, tc.want) {
				t.Errorf("reason is %q, want %q", st.Fatal, tc.want)
			}
			r.release("a")
			if f := r.files(); len(f) != 0 {
				t.Errorf("left behind: %v", f)
			}
		})
	}
}

func (r *rig) edit(id string, f func(*record)) {
	r.t.Helper()
	path := filepath.Join(r.srv.opts.Dir, id+recordSuffix)
	b, err := os.ReadFile(path)
	must(r.t, err)
	var rec record
	must(r.t, json.Unmarshal(b, &rec))
	f(&rec)
	must(r.t, writeRecord(r.srv.opts.Dir, rec))
}

func TestDamagedRecordsDoNotHideTheOthers(t *testing.T) {
	r := newRig(t, 1)
	v := r.shared("good")
	must(t, r.srv.Close())
	dir := filepath.Join(r.dir, "run")
	for name, text := range map[string]string{"bad.json": "{", "other.json": `{"sandbox_id":"good"}`, "UPPER.json": "{}", "x.tmp": "?"} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	if recs, err := readRecords(dir); len(recs) != 1 || err == nil || !strings.Contains(err.Error(), "bad") {
		t.Errorf("%d records, %v", len(recs), err)
	}
	r.start()
	v.wantSum(r.content)
}

// TestKeeperReplacesAKilledPager: kill -9 of the real process, with VMs.
func TestKeeperReplacesAKilledPager(t *testing.T) {
	r := newRig(t, 4)
	must(t, r.srv.Close())
	t.Setenv(roleEnv, "pager")
	dir := r.dir
	must(t, os.RemoveAll(filepath.Join(dir, "run")))
	socket := filepath.Join(dir, "pager.sock")
	exe, err := os.Executable()
	must(t, err)
	k, err := Keep(context.Background(), KeeperOptions{
		Command: []string{exe, dir, socket}, Socket: socket, LogPath: filepath.Join(dir, "pager.log"), Logger: slog.New(slog.DiscardHandler),
	})
	must(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	prep, err := k.Client().PrepareMemory(ctx, connect.NewRequest(&pagerv1.PrepareMemoryRequest{SandboxId: "s", ImageId: r.image.String()}))
	must(t, err)
	if int(prep.Msg.Pid) != k.PID() {
		t.Errorf("pager %d says it is %d", k.PID(), prep.Msg.Pid)
	}
	shared, copied := startVMM(t), startVMM(t)
	shared.do("share /proc/%d/fd/%d %d", prep.Msg.Pid, prep.Msg.Fd, len(r.content))
	_, err = k.Client().PrepareMemory(ctx, connect.NewRequest(&pagerv1.PrepareMemoryRequest{
		SandboxId: "c", ImageId: r.image.String(), Mode: pagerv1.MemoryMode_MEMORY_MODE_COPY, SocketPath: r.socket("c")}))
	must(t, err)
	for id, v := range map[string]*vmmProc{"s": shared, "c": copied} {
		_, err := k.Client().AttachMemory(ctx, connect.NewRequest(&pagerv1.AttachMemoryRequest{SandboxId: id, Pid: int32(v.pid())}))
		must(t, err)
	}
	copied.do("handover %s %d 0", r.socket("c"), len(r.content))
	want := slices.Clone(r.content)
	copied.do("remove 0 %d", 10*4096)
	clear(want[:10*4096])
	for range 3 {
		old := k.PID()
		must(t, unix.Kill(old, unix.SIGKILL))
		copied.wantSum(want) // waits for the next pager where it faults
		for k.PID() == old {
			if err := ctx.Err(); err != nil {
				t.Fatal("no other pager was started")
			}
			unix.Nanosleep(&unix.Timespec{Nsec: 5e6}, nil)
		}
	}
	shared.wantSum(r.content)
	shared.kill()
	copied.kill()
	must(t, k.Stop())
	if _, err := net.Dial("unix", socket); err == nil {
		t.Error("a pager still answers")
	}
	if err := unix.Kill(k.PID(), 0); err != nil && !errors.Is(err, unix.ESRCH) {
		t.Error(err)
	}
}
