package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/filesystem"
	"git.omukk.dev/wrenn/sandbox/internal/gen/filesystem/filesystemconnect"
)

func TestStatAndLinks(t *testing.T) {
	a := confirmed(t)
	file := filepath.Join(a.home, "file")
	writeFile(t, file, "12345")
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"link": "file", "dirlink": "/", "broken": "nowhere"} {
		if err := os.Symlink(to, filepath.Join(a.home, name)); err != nil {
			t.Fatal(err)
		}
	}
	codecs(t, func(t *testing.T, opts ...connect.ClientOption) {
		c := a.filesystem(opts...)
		stat := func(path string) *pb.EntryInfo {
			t.Helper()
			r, err := c.Stat(t.Context(), connect.NewRequest(&pb.StatRequest{Path: path}))
			if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			return r.Msg.GetEntry()
		}
		for _, path := range []string{file, "file", "~/file", "./x/../file"} {
			e := stat(path)
			if e.GetName() != "file" || e.GetPath() != file || e.GetType() != pb.FileType_FILE_TYPE_FILE || e.GetSize() != 5 ||
				e.GetMode() != 0o640 || e.GetPermissions() != "-rw-r-----" || e.GetOwner() != "root" || e.GetGroup() != "users" ||
				time.Since(e.GetModifiedTime().AsTime()) > time.Hour || e.SymlinkTarget != nil {
				t.Errorf("%s: %v", path, e)
			}
		}
		if e := stat("link"); e.GetSymlinkTarget() != file || e.GetType() != pb.FileType_FILE_TYPE_FILE || e.GetMode() != 0o640 || e.GetName() != "link" {
			t.Errorf("link: %v", e)
		}
		if e := stat("dirlink"); e.GetSymlinkTarget() != "/" || e.GetType() != pb.FileType_FILE_TYPE_DIRECTORY {
			t.Errorf("dirlink: %v", e)
		}
		if e := stat("broken"); e.GetSymlinkTarget() != "nowhere" || e.GetType() != pb.FileType_FILE_TYPE_SYMLINK {
			t.Errorf("broken: %v", e)
		}
		if e := stat(""); e.GetPath() != a.home {
			t.Errorf("the empty path: %v", e)
		}
	})
}

func TestBadPaths(t *testing.T) {
	a := confirmed(t)
	writeFile(t, filepath.Join(a.home, "file"), "x")
	c, ctx := a.filesystem(), t.Context()
	long := strings.Repeat("a/", 2100)
	for name, tc := range map[string]struct {
		path string
		code connect.Code
	}{
		"NUL":           {"a\x00b", connect.CodeInvalidArgument},
		"long":          {long, connect.CodeInvalidArgument},
		"long name":     {strings.Repeat("a", 300), connect.CodeInvalidArgument},
		"other's home":  {"~root/x", connect.CodeInvalidArgument},
		"under a file":  {"file/x", connect.CodeInvalidArgument},
		"not there":     {"none", connect.CodeNotFound},
		"not there dir": {"none/none", connect.CodeNotFound},
	} {
		_, err := c.Stat(ctx, connect.NewRequest(&pb.StatRequest{Path: tc.path}))
		if connect.CodeOf(err) != tc.code {
			t.Errorf("stat, %s: %v", name, err)
		}
		_, err = c.ListDir(ctx, connect.NewRequest(&pb.ListDirRequest{Path: tc.path}))
		if connect.CodeOf(err) != tc.code {
			t.Errorf("list, %s: %v", name, err)
		}
		_, err = c.CreateWatcher(ctx, connect.NewRequest(&pb.CreateWatcherRequest{Path: tc.path}))
		if connect.CodeOf(err) != tc.code {
			t.Errorf("watch, %s: %v", name, err)
		}
		_, err = c.Move(ctx, connect.NewRequest(&pb.MoveRequest{Source: tc.path, Destination: "d"}))
		if connect.CodeOf(err) != tc.code {
			t.Errorf("move, %s: %v", name, err)
		}
	}
	_, err := c.ListDir(ctx, connect.NewRequest(&pb.ListDirRequest{Path: "file"}))
	wantCode(t, err, connect.CodeInvalidArgument, "not a directory")
	_, err = c.ListDir(ctx, connect.NewRequest(&pb.ListDirRequest{Path: "/", Depth: 1 << 30}))
	wantCode(t, err, connect.CodeInvalidArgument, "depth")
	_, err = c.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: "file"}))
	wantCode(t, err, connect.CodeInvalidArgument, "not a directory")
	for _, path := range []string{"", "/", "//", "/.."} {
		_, err = c.Remove(ctx, connect.NewRequest(&pb.RemoveRequest{Path: path}))
		wantCode(t, err, connect.CodeInvalidArgument, "path")
	}
	_, err = c.Move(ctx, connect.NewRequest(&pb.MoveRequest{Source: "file"}))
	wantCode(t, err, connect.CodeInvalidArgument, "destination")
	_, err = a.filesystemAs(withToken{token: testToken, user: "ghost"}).Stat(ctx, connect.NewRequest(&pb.StatRequest{Path: "/"}))
	wantCode(t, err, connect.CodeUnauthenticated, "invalid username: 'ghost'")
}

func TestMakeMoveListRemove(t *testing.T) {
	a := confirmed(t)
	codecs(t, func(t *testing.T, opts ...connect.ClientOption) {
		c, ctx := a.filesystem(opts...), t.Context()
		mk, err := c.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: "a/b/c"}))
		if err != nil || mk.Msg.GetEntry().GetPath() != filepath.Join(a.home, "a/b/c") || mk.Msg.GetEntry().GetType() != pb.FileType_FILE_TYPE_DIRECTORY {
			t.Fatalf("%v %v", mk, err)
		}
		_, err = c.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: "a/b"}))
		wantCode(t, err, connect.CodeAlreadyExists, "already exists")
		writeFile(t, filepath.Join(a.home, "a/b/f"), "x")
		mv, err := c.Move(ctx, connect.NewRequest(&pb.MoveRequest{Source: "a/b/f", Destination: "a/new/dir/g"}))
		if err != nil || mv.Msg.GetEntry().GetPath() != filepath.Join(a.home, "a/new/dir/g") {
			t.Fatalf("%v %v", mv, err)
		}
		list := func(path string, depth uint32) []string {
			t.Helper()
			r, err := c.ListDir(ctx, connect.NewRequest(&pb.ListDirRequest{Path: path, Depth: depth}))
			if err != nil {
				t.Fatal(err)
			}
			var out []string
			for _, e := range r.Msg.GetEntries() {
				out = append(out, strings.TrimPrefix(e.GetPath(), a.home+"/"))
			}
			return out
		}
		for depth, want := range map[uint32]string{0: "a/b a/new", 1: "a/b a/new", 2: "a/b a/b/c a/new a/new/dir", 3: "a/b a/b/c a/new a/new/dir a/new/dir/g"} {
			if got := strings.Join(list("a", depth), " "); got != want {
				t.Errorf("depth %d: %s, want %s", depth, got, want)
			}
		}
		// Through a link, under the link's own name.
		if err := os.Symlink("a", filepath.Join(a.home, "l")); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(list("l", 1), " "); got != "l/b l/new" {
			t.Errorf("through a link: %s", got)
		}
		for _, path := range []string{"l", "a", "a", "never/was"} { // what is missing is fine
			if _, err := c.Remove(ctx, connect.NewRequest(&pb.RemoveRequest{Path: path})); err != nil {
				t.Errorf("remove %s: %v", path, err)
			}
		}
		if got := list("", 1); len(got) != 0 {
			t.Errorf("left: %v", got)
		}
	})
}

// What calls make is the user's.
func TestOwnership(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to give files away")
	}
	a := confirmed(t, func(o *Options) {
		b, err := os.ReadFile(o.Passwd)
		if err != nil {
			t.Fatal(err)
		}
		home := strings.Split(strings.Split(string(b), "\n")[1], ":")[5]
		writeFile(t, o.Passwd, "user:x:12345:12346::"+home+":/bin/sh\n")
		writeFile(t, o.Group, "team:x:12346:\n")
	})
	u, err := a.accounts.lookup("user")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.filesystem().MakeDir(t.Context(), connect.NewRequest(&pb.MakeDirRequest{Path: "x/y"})); err != nil {
		t.Fatal(err)
	}
	if status, text := a.post(t, "z/file", "text"); status != 200 {
		t.Fatalf("%d %s", status, text)
	}
	for _, p := range []string{"x", "x/y", "z", "z/file"} {
		e, err := a.newLister().entry(filepath.Join(u.home, p))
		if err != nil || e.GetOwner() != "user" || e.GetGroup() != "team" {
			t.Errorf("%s: %v %v", p, e, err)
		}
	}
}

// watchSource is one of the two ways to watch.
type watchSource func(t *testing.T, a *agent, path string, recursive bool) (wait func(t *testing.T, want ...string))

// needs collects events until all wanted have come, in any order.
func needs(t *testing.T, want []string, more func() []*pb.FilesystemEvent) {
	t.Helper()
	var got []string
	eventually(t, fmt.Sprintf("events %q", want), func() bool {
		for _, e := range more() {
			got = append(got, strings.TrimPrefix(e.GetType().String(), "EVENT_TYPE_")+" "+e.GetName())
		}
		for _, w := range want {
			if !slices.Contains(got, w) {
				return false
			}
		}
		return true
	})
}

func streamed(t *testing.T, a *agent, path string, recursive bool) func(t *testing.T, want ...string) {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	s, err := a.filesystem().WatchDir(ctx, connect.NewRequest(&pb.WatchDirRequest{Path: path, Recursive: recursive}))
	if err != nil {
		t.Fatal(err)
	}
	if !s.Receive() || s.Msg().GetStart() == nil {
		t.Fatalf("first event %v, %v", s.Msg(), s.Err())
	}
	return func(t *testing.T, want ...string) {
		t.Helper()
		needs(t, want, func() []*pb.FilesystemEvent {
			if !s.Receive() {
				t.Fatalf("the stream ended: %v", s.Err())
			}
			return []*pb.FilesystemEvent{s.Msg().GetFilesystem()}
		})
	}
}

func polled(t *testing.T, a *agent, path string, recursive bool) func(t *testing.T, want ...string) {
	c := a.filesystem(connect.WithProtoJSON())
	w, err := c.CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: path, Recursive: recursive}))
	if err != nil {
		t.Fatal(err)
	}
	id := w.Msg.GetWatcherId()
	t.Cleanup(func() {
		ctx := context.Background()
		if _, err := c.RemoveWatcher(ctx, connect.NewRequest(&pb.RemoveWatcherRequest{WatcherId: id})); err != nil {
			t.Error(err)
		}
		_, err := c.GetWatcherEvents(ctx, connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: id}))
		wantCode(t, err, connect.CodeNotFound, id)
	})
	return func(t *testing.T, want ...string) {
		t.Helper()
		needs(t, want, func() []*pb.FilesystemEvent {
			r, err := c.GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: id}))
			if err != nil {
				t.Fatal(err)
			}
			return r.Msg.GetEvents()
		})
	}
}

func TestWatch(t *testing.T) {
	for name, source := range map[string]watchSource{"stream": streamed, "watcher": polled} {
		t.Run(name, func(t *testing.T) {
			a := confirmed(t)
			dir := filepath.Join(a.home, "w")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			wait := source(t, a, "w", false)
			file := filepath.Join(dir, "f")
			writeFile(t, file, "one")
			wait(t, "CREATE f", "WRITE f")
			// An upload over a file is a write of that name.
			if status, text := a.post(t, "w/f", "two"); status != 200 {
				t.Fatalf("%d %s", status, text)
			}
			wait(t, "WRITE f")
			if err := os.Chmod(file, 0o600); err != nil {
				t.Fatal(err)
			}
			wait(t, "CHMOD f")
			if err := os.Rename(file, file+"2"); err != nil {
				t.Fatal(err)
			}
			wait(t, "RENAME f", "CREATE f2")
			if err := os.Remove(file + "2"); err != nil {
				t.Fatal(err)
			}
			wait(t, "REMOVE f2")
		})
	}
}

func TestWatchRecursive(t *testing.T) {
	for name, source := range map[string]watchSource{"stream": streamed, "watcher": polled} {
		t.Run(name, func(t *testing.T) {
			a := confirmed(t)
			if err := os.MkdirAll(filepath.Join(a.home, "old/deep"), 0o755); err != nil {
				t.Fatal(err)
			}
			wait := source(t, a, a.home, true)
			writeFile(t, filepath.Join(a.home, "old/deep/f"), "x")
			wait(t, "CREATE old/deep/f")
			// All at once: what is made before the new directories are watched
			// is announced all the same.
			if err := os.MkdirAll(filepath.Join(a.home, "n/e/w"), 0o755); err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(a.home, "n/e/w/f"), "x")
			wait(t, "CREATE n", "CREATE n/e", "CREATE n/e/w", "CREATE n/e/w/f")
		})
	}
}

func TestWatchEntryAndEnd(t *testing.T) {
	a := confirmed(t)
	dir := filepath.Join(a.home, "w")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s, err := a.filesystem().WatchDir(t.Context(), connect.NewRequest(&pb.WatchDirRequest{Path: "w", IncludeEntry: true}))
	if err != nil || !s.Receive() {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	if !s.Receive() || s.Msg().GetFilesystem().GetEntry().GetPath() != filepath.Join(dir, "d") {
		t.Fatalf("%v %v", s.Msg(), s.Err())
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for s.Receive() {
	}
	wantCode(t, s.Err(), connect.CodeNotFound, "is gone")
}

// A watcher that nobody asks keeps a bounded number of events and says so.
func TestWatcherOverflow(t *testing.T) {
	a := confirmed(t)
	c := a.filesystem()
	r, err := c.CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: a.home}))
	if err != nil {
		t.Fatal(err)
	}
	w, err := a.watchers.find(r.Msg.GetWatcherId())
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.events = make([]*pb.FilesystemEvent, maxWatcherEvents)
	w.mu.Unlock()
	writeFile(t, filepath.Join(a.home, "f"), "x")
	eventually(t, "it gives up", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.err != nil
	})
	get := func() (int, error) {
		r, err := c.GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: r.Msg.GetWatcherId()}))
		if err != nil {
			return 0, err
		}
		return len(r.Msg.GetEvents()), nil
	}
	if n, err := get(); n != maxWatcherEvents || err != nil {
		t.Errorf("%d events, %v", n, err)
	}
	_, err = get()
	wantCode(t, err, connect.CodeResourceExhausted, "lost")
}

func TestWatcherLimit(t *testing.T) {
	a := confirmed(t)
	create := func(c filesystemconnect.FilesystemClient) error {
		_, err := c.CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: a.home}))
		return err
	}
	for i := range maxWatchers {
		if err := create(a.filesystem()); err != nil {
			t.Fatalf("watcher %d: %v", i, err)
		}
	}
	wantCode(t, create(a.filesystem()), connect.CodeResourceExhausted, "watchers")
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := create(a.filesystem()); err != nil {
		t.Errorf("after closing them: %v", err)
	}
}
