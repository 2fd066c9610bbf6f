package e2e

import (
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// ownPrefix is where the links of the server under test get their addresses,
// so that they can be told from those of other servers on this host.
const ownPrefix = "10.217.0.0/16"

// host is what a server holds of the host, as its owner can see it.
type host struct {
	processes   map[int]bool
	links       int // host ends of the sandboxes' links
	files       map[string]bool
	descriptors map[string]int // of server and pager together, by kind
	sockets     int
	database    int // descriptors of it
}

// mostDatabase is what the store's eight connections hold at most: they are made
// as they are needed at once, and kept.
const mostDatabase = 8 * 3

// look takes stock. Descriptors of sockets and of the database are counted
// apart: connections come and go.
func look(t *testing.T, s *harness.Server) host {
	t.Helper()
	h := host{processes: map[int]bool{}, files: map[string]bool{}, descriptors: map[string]int{}, links: linksOf(t)}
	for _, p := range harness.ProcessesOf(s.Dir) {
		h.processes[p.PID] = true
		fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID))
		for _, fd := range fds {
			target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", p.PID, fd.Name()))
			switch kind := descriptorKind(target); {
			case err != nil: // closed meanwhile
			case kind == "socket:":
				h.sockets++
			case kind == "database":
				h.database++
			default:
				h.descriptors[kind]++
			}
		}
	}
	err := filepath.WalkDir(s.Dir, func(path string, d fs.DirEntry, err error) error {
		// The database's own files grow and vanish as it likes.
		if err == nil && !strings.HasPrefix(filepath.Base(path), "wrenn.db") {
			h.files[strings.TrimPrefix(path, s.Dir)] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

var numbers = regexp.MustCompile(`[0-9]+`)

// descriptorKind leaves out what differs from one descriptor to the next.
func descriptorKind(target string) string {
	for _, kind := range []string{"socket:", "pipe:", "/run/netns/", "/memfd:"} {
		if strings.HasPrefix(target, kind) {
			return kind
		}
	}
	if strings.Contains(target, "wrenn.db") {
		return "database"
	}
	return numbers.ReplaceAllString(target, "N")
}

func linksOf(t *testing.T) int {
	t.Helper()
	prefix := netip.MustParsePrefix(ownPrefix)
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, l := range links {
		addrs, _ := l.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && prefix.Contains(p.Addr()) {
				n++
			}
		}
	}
	return n
}

// differs says what is not as it was, or nothing.
func (h host) differs(now host) string {
	switch {
	case !maps.Equal(h.processes, now.processes):
		return fmt.Sprintf("processes %v, were %v", now.processes, h.processes)
	case h.links != now.links:
		return fmt.Sprintf("%d links, were %d", now.links, h.links)
	case !maps.Equal(h.files, now.files):
		return fmt.Sprintf("files: %v", difference(h.files, now.files))
	case more(h.descriptors, now.descriptors):
		return fmt.Sprintf("descriptors %v, were %v", now.descriptors, h.descriptors)
	// Idle connections of clients; twenty cycles that lost one each would show.
	case now.sockets > h.sockets+10:
		return fmt.Sprintf("%d sockets, were %d", now.sockets, h.sockets)
	case now.database > mostDatabase:
		return fmt.Sprintf("%d descriptors of the database, at most %d", now.database, mostDatabase)
	}
	return ""
}

// more says whether there is more of any kind now.
func more(then, now map[string]int) bool {
	for kind, n := range now {
		if n > then[kind] {
			return true
		}
	}
	return false
}

func difference(a, b map[string]bool) []string {
	var out []string
	for f := range a {
		if !b[f] {
			out = append(out, "gone: "+f)
		}
	}
	for f := range b {
		if !a[f] {
			out = append(out, "new: "+f)
		}
	}
	return out
}

func TestTwentyLifeCyclesLeaveTheHostAsItWas(t *testing.T) {
	s := warmServer(t, "--network-prefix", ownPrefix)
	for i := range 2 { // what is made once, and kept warm, is there now
		lifeCycle(t, s, i)
	}
	var before host
	// Slots are prepared and taken apart in the background. What is open for a
	// moment only is no part of what was.
	settle := func() bool {
		last := before
		before = look(t, s)
		return before.links == 4 && last.differs(before) == "" && before.differs(last) == ""
	}
	if !harness.Eventually(time.Minute, settle) {
		t.Fatalf("the pool does not come to rest: %d links", before.links)
	}
	for i := 2; i < 22; i++ {
		lifeCycle(t, s, i)
	}
	var diff string
	if !harness.Eventually(time.Minute, func() bool {
		diff = before.differs(look(t, s))
		return diff == ""
	}) {
		t.Errorf("after 20 life cycles: %s", diff)
	}
	if err := s.Stop(); err != nil {
		t.Fatalf("end: %v", err)
	}
	nothingNames(t, s.Dir)
}

// lifeCycle takes one sandbox through all that there is and removes all of it.
func lifeCycle(t *testing.T, s *harness.Server, i int) {
	t.Helper()
	ctx := timeout(t, 5*time.Minute)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("life cycle %d: %v", i, err)
		}
	}
	template := warm
	if i%10 == 0 {
		template = "base"
	}
	sb, err := s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: template})
	must(err)
	sh(t, s, sb.ID, "head -c 2M /dev/urandom > /home/user/f; sync")
	pause(t, s, sb.ID)
	resume(t, s, sb.ID)
	name := fmt.Sprintf("cycle%d", i)
	_, err = s.CreateSnapshot(ctx, sb.ID, name)
	must(err)
	clone, err := s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: name})
	must(err)
	must(s.DeleteSnapshot(ctx, name))
	if i%2 == 0 {
		pause(t, s, clone.ID)
	}
	must(s.DeleteSandbox(ctx, clone.ID))
	must(s.DeleteSandbox(ctx, sb.ID))
}

// nothingNames looks for what an ended server left: processes, links, sockets,
// mounts, loop devices.
func nothingNames(t *testing.T, dir string) {
	t.Helper()
	if !harness.Eventually(time.Minute, func() bool {
		return len(harness.ProcessesOf(dir)) == 0 && linksOf(t) == 0
	}) {
		t.Errorf("left: processes %v, %d links", harness.ProcessesOf(dir), linksOf(t))
	}
	// A process has no command line any more before the last of it is gone.
	var left []string
	if !harness.Eventually(time.Minute, func() bool {
		left = namedIn(t, dir)
		return len(left) == 0
	}) {
		t.Errorf("left: %s", strings.Join(left, "; "))
	}
}

// namedIn lists the sockets, mounts and loop devices of a directory.
func namedIn(t *testing.T, dir string) (left []string) {
	t.Helper()
	for _, table := range []string{"/proc/net/unix", "/proc/self/mountinfo"} {
		b, err := os.ReadFile(table)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, dir) {
				left = append(left, table+": "+strings.TrimSpace(line))
			}
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, loop := range loops {
		if b, _ := os.ReadFile(loop); strings.Contains(string(b), dir) {
			left = append(left, fmt.Sprintf("%s over %s", loop, b))
		}
	}
	return left
}

// smallDisk mounts a file system of so many MiB for a server's state.
func smallDisk(t *testing.T, mib int) string {
	t.Helper()
	requireHost(t)
	dir, err := os.MkdirTemp(harness.DevDir(), "e-")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("wrenn-test", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=711", mib)); err != nil {
		os.Remove(dir)
		t.Fatalf("mount a small file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
		os.Remove(dir)
	})
	return dir
}

// fill leaves so many bytes of dir's file system free and returns how to
// empty it again.
func fill(t *testing.T, dir string, free uint64) (empty func()) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if have := st.Bavail * uint64(st.Bsize); have > free {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(have-free)); err != nil {
			t.Fatalf("fill the disk: %v", err)
		}
	}
	return func() {
		if err := os.Remove(ballast); err != nil {
			t.Error(err)
		}
	}
}

func TestAFullDiskDuringAPauseLeavesTheSandboxRunning(t *testing.T) {
	s := ownServerIn(t, smallDisk(t, 1200))
	sb := create(t, s, client.CreateSandboxRequest{})
	if err := startKeeper(timeout(t, time.Minute), s, sb.ID, 64); err != nil {
		t.Fatal(err)
	}
	was := ask(t, s, sb.ID, "set kept")
	files := look(t, s).files
	empty := fill(t, s.Dir, 16<<20)
	_, err := s.PauseSandbox(timeout(t, time.Minute), sb.ID)
	if err == nil || !strings.Contains(err.Error(), "disk") {
		t.Errorf("a pause on a full disk: %v; want an error that names the disk", err)
	}
	if now, err := s.GetSandbox(t.Context(), sb.ID); err != nil || now.Status != client.StatusRunning {
		t.Fatalf("after a failed pause: %+v, %v; want running", now, err)
	}
	if a := ask(t, s, sb.ID, "stat"); a.PID != was.PID || a.Value != "kept" {
		t.Errorf("after a failed pause: %+v, was %+v", a, was)
	}
	empty()
	var left []string
	if !harness.Eventually(time.Minute, func() bool {
		left = difference(files, look(t, s).files)
		return len(left) == 0
	}) {
		t.Errorf("a failed pause leaves %v", left)
	}
	pause(t, s, sb.ID)
	resume(t, s, sb.ID)
	if a := ask(t, s, sb.ID, "stat"); a.PID != was.PID || a.Value != "kept" {
		t.Errorf("after room was made: %+v, was %+v", a, was)
	}
}
