package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/client"
)

func cp(t *testing.T, args ...string) result {
	t.Helper()
	return wrenn(t, append([]string{"sandbox", "cp"}, args...)...)
}

// write makes local files; a name that ends in "/" is a directory.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(p, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(p, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
}

// tree lists all below dir as "mode path content".
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if d.IsDir() {
			fmt.Fprintf(&b, "%s/\n", rel)
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		content, err := os.ReadFile(p)
		fmt.Fprintf(&b, "%s %s %s\n", info.Mode(), rel, content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestCpFiles(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	s.PutEntry("sb1", "/dir", client.FileTypeDir, "", 0o755)
	dir := t.TempDir()
	t.Chdir(dir)
	write(t, dir, map[string]string{"a.txt": "from here", "sb1:odd": "odd", "sub/": ""})
	for _, tc := range []struct{ src, dst, lands string }{
		{"a.txt", "sb1:/new", "/new"},
		{"a.txt", "sb1:/dir", "/dir/a.txt"},
		{"a.txt", "sb1:/fresh/", "/fresh/a.txt"},
		{"./sb1:odd", "sb1:/dir/", "/dir/sb1:odd"},
	} {
		cp(t, tc.src, tc.dst).want(t, 0, "")
		if got, mode, ok := s.Content("sb1", tc.lands); !ok || mode != 0o640 || !(got == "from here" || got == "odd") {
			t.Errorf("cp %s %s: %s is %q, %o", tc.src, tc.dst, tc.lands, got, mode)
		}
	}
	wrennIn(t, strings.NewReader("piped"), "sandbox", "cp", "-", "sb1:/piped").want(t, 0, "")
	if got, _, _ := s.Content("sb1", "/piped"); got != "piped" {
		t.Errorf("from standard input: %q", got)
	}
	s.Put("sb1", "/bin/tool", "#!", 0o4755)
	s.Put("sb1", "/bin/ro", "ro", 0o444)
	cp(t, "sb1:/bin/tool", "got").want(t, 0, "")
	cp(t, "sb1:/bin/ro", "sub").want(t, 0, "")
	cp(t, "sb1:/bin/ro", "sub/").want(t, 0, "") // replaces
	if r := cp(t, "sb1:/bin/tool", "-"); r.stdout != "#!" {
		t.Errorf("to standard output: %q", r.stdout)
	}
	cp(t, "sb1:/bin/tool", "/dev/null").want(t, 0, "")
	want := "-rw-r----- a.txt from here\n-rwxr-xr-x got #!\n-rw-r----- sb1:odd odd\nsub/\n-r--r--r-- sub/ro ro\n"
	if got := tree(t, dir); got != want {
		t.Errorf("here is\n%s, want\n%s", got, want)
	}
}

func TestCpDirectories(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	dir := t.TempDir()
	t.Chdir(dir)
	write(t, dir, map[string]string{"src/a": "A", "src/deep/er/b": "B", "src/empty/": "", "target": "linked"})
	for link, target := range map[string]string{"src/link": "../target", "src/loop": ".", "src/dangling": "nowhere"} {
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
	}
	r := cp(t, "src", "sb1:/copy")
	if r.code != 0 || !strings.Contains(r.stderr, "src/loop: a link to a directory") || !strings.Contains(r.stderr, "dangling: the link leads nowhere") {
		t.Errorf("upload: %d %q", r.code, r.stderr)
	}
	cp(t, "src", "sb1:/copy")   // now it exists: goes into it
	cp(t, "src/.", "sb1:/flat") // the contents
	for _, p := range []string{"/copy", "/copy/src", "/flat"} {
		for name, want := range map[string]string{"a": "A", "deep/er/b": "B", "link": "linked"} {
			if got, _, _ := s.Content("sb1", p+"/"+name); got != want {
				t.Errorf("%s/%s is %q, want %q", p, name, got, want)
			}
		}
	}
	s.PutEntry("sb1", "/copy/dirlink", client.FileTypeSymlink, "/flat", 0o777)
	s.PutEntry("sb1", "/copy/filelink", client.FileTypeSymlink, "/flat/a", 0o777)
	s.PutEntry("sb1", "/copy/fifo", client.FileTypeOther, "", 0o644)
	if err := os.RemoveAll("src"); err != nil {
		t.Fatal(err)
	}
	wrenn(t, "sandbox", "exec", "sb1", "x")
	r = cp(t, "sb1:/copy", "back")
	if r.code != 0 || !strings.Contains(r.stderr, "/copy/dirlink: the link leads to no file") || !strings.Contains(r.stderr, "/copy/fifo: not a regular file") {
		t.Errorf("download: %d %q", r.code, r.stderr)
	}
	cp(t, "sb1:/copy/src/deep", ".").want(t, 0, "")
	cp(t, "sb1:/copy/src/.", "back2").want(t, 0, "")
	cp(t, "sb1:/copy", "-").want(t, 1, "tar c DIR")
	for p, want := range map[string]string{"back/a": "A", "back/deep/er/b": "B", "back/link": "linked", "back/filelink": "A",
		"back/src/a": "A", "deep/er/b": "B", "back2/a": "A"} {
		if got, err := os.ReadFile(p); string(got) != want {
			t.Errorf("%s is %q, %v; want %q", p, got, err, want)
		}
	}
	if info, err := os.Stat("back/empty"); err != nil || !info.IsDir() {
		t.Errorf("the empty directory did not come back: %v", err)
	}
}

// A sandbox is not trusted: its names and links must not lead outside.
func TestCpFromAHostileSandbox(t *testing.T) {
	for name, evil := range map[string]string{
		"parent":   "../evil",
		"dot dot":  "..",
		"absolute": "/etc/evil",
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t)
			s.Add(client.Sandbox{})
			s.Put("sb1", "/d/ok", "ok", 0o644)
			s.PutEntry("sb1", "/d/"+evil, client.FileTypeFile, "evil", 0o644)
			dir := t.TempDir()
			r := cp(t, "sb1:/d", filepath.Join(dir, "in"))
			if got := tree(t, dir); strings.Contains(got, "evil") {
				t.Errorf("here is %s", got)
			}
			if name != "absolute" { // that one cannot be told from a directory's name
				r.want(t, 1, "which is none")
			}
		})
	}
	t.Run("link in the way", func(t *testing.T) {
		s := startServer(t)
		s.Add(client.Sandbox{})
		s.Put("sb1", "/d/out/passwd", "evil", 0o644)
		s.Put("sb1", "/d/file", "evil", 0o644)
		outside, dir := t.TempDir(), t.TempDir()
		write(t, outside, map[string]string{"file": "mine"})
		for link, target := range map[string]string{"out": outside, "file": filepath.Join(outside, "file")} {
			if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
				t.Fatal(err)
			}
		}
		r := cp(t, "sb1:/d/.", dir)
		if r.code != 1 {
			t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
		if got := tree(t, outside); got != "-rw-r----- file mine\n" {
			t.Errorf("outside is now %s", got)
		}
	})
}

func TestCpRefusals(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	s.Add(client.Sandbox{Status: client.StatusPaused})
	s.Put("sb1", "/file", "x", 0o644)
	dir := t.TempDir()
	t.Chdir(dir)
	write(t, dir, map[string]string{"local": "x"})
	for _, tc := range []struct {
		src, dst string
		code     int
		stderr   string
	}{
		{"local", "other", 2, "write SANDBOX:PATH"},
		{"sb1:/a", "sb2:/b", 2, "through a pipe"},
		{"local", "sb1:", 2, "a path is empty"},
		{"sb1:", "x", 2, "a path is empty"},
		{"missing", "sb1:/x", 1, "missing: no such file"},
		{"local", "nobody:/x", 3, "no sandbox nobody"},
		{"local", "sb2:/x", 4, "paused"},
		{"nobody:/x", "x", 3, "no sandbox nobody"},
		{"sb1:/missing", "x", 3, "no file /missing"},
		{"sb1:/missing", "-", 3, "no file /missing"},
		{"sb1:/file", "no/such/dir/x", 1, "no such file"},
		{"sb1:/big/100000x", "cut", 1, "copying /big/100000x after"},
		{"sb1:/big/100000x", "-", 1, "unexpected EOF"},
	} {
		t.Run(tc.src+" "+tc.dst, func(t *testing.T) {
			r := wrennIn(t, strings.NewReader("x"), "sandbox", "cp", tc.src, tc.dst)
			r.want(t, tc.code, tc.stderr)
		})
	}
	if got := tree(t, dir); got != "-rw-r----- local x\n" {
		t.Errorf("left behind: %s", got)
	}
}

func TestCpUsesLittleMemory(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	const size = 64 << 20
	file := filepath.Join(t.TempDir(), "big")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cp(t, fmt.Sprintf("sb1:/big/%d", size), file).want(t, 0, "")
	cp(t, file, "sb1:/discard/").want(t, 0, "")
	runtime.ReadMemStats(&after)
	if info, err := os.Stat(file); err != nil || info.Size() != size || s.Discarded() != size {
		t.Errorf("%v, %v, %d bytes arrived there", info, err, s.Discarded())
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
		t.Errorf("copying twice %d MiB allocated %d MiB", size>>20, n>>20)
	}
}
