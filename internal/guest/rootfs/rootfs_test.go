package rootfs

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Unpacking takes a process's root away, so it runs in one of its own.
const childEnv = "WRENN_TEST_UNPACK"

func TestMain(m *testing.M) {
	if root := os.Getenv(childEnv); root != "" {
		n, err := Unpack(root, os.Stdin)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(n.Entries, n.Devices)
		os.Exit(0)
	}
	if os.Geteuid() != 0 {
		fmt.Println("skipped: unpacking images needs root; CI runs as root")
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type entry struct {
	tar.Header
	text string
}

func file(name, text string) entry { return entry{tar.Header{Name: name, Mode: 0o644}, text} }
func dir(name string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}
func link(name, to string) entry {
	return entry{tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeSymlink, Mode: 0o777}, ""}
}
func hard(name, to string) entry {
	return entry{tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeLink}, ""}
}

func layer(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.text))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// unpack applies a layer in another process.
func unpack(t *testing.T, root string, tar []byte) (out string, err error) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+root)
	cmd.Stdin = bytes.NewReader(tar)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	b, err := cmd.Output()
	if err != nil {
		err = errors.New(stderr.String())
	}
	return strings.TrimSpace(string(b)), err
}

func apply(t *testing.T, root string, layers ...[]byte) {
	t.Helper()
	for _, l := range layers {
		if _, err := unpack(t, root, l); err != nil {
			t.Fatal(err)
		}
	}
}

// tree lists what is below a directory, with the content of files.
func tree(t *testing.T, root string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		line := strings.TrimPrefix(p, root+"/")
		switch {
		case e.IsDir():
			line += "/"
		case e.Type() == fs.ModeSymlink:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + to
		case e.Type().IsRegular():
			text, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += "=" + string(text)
		default:
			line += " " + e.Type().String()
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func wantTree(t *testing.T, root string, want ...string) {
	t.Helper()
	if got := tree(t, root); !slices.Equal(got, want) {
		t.Errorf("the tree is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestLayersAreAppliedOneOnTheOther(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	apply(t, root,
		layer(t, dir("./"), dir("etc/"), file("etc/keep", "1"), file("etc/gone", "1"), file("etc/changed", "1"), file("etc/becomes-dir", "1"),
			dir("opq/"), file("opq/old", "1"), dir("opq/sub/"), file("opq/sub/old", "1"), dir("tree/"), file("tree/x", "1"), dir("becomes-file/"), file("becomes-file/x", "1")),
		layer(t, file("etc/.wh.gone", ""), file("etc/changed", "2"), dir("etc/becomes-dir/"), file("etc/becomes-dir/y", "2"),
			file("opq/early", "2"), file("opq/.wh..wh..opq", ""), file("opq/sub/late", "2"), file(".wh.tree", ""), file("becomes-file", "2"), file("no/parents/named", "2"),
			// A layer's own whiteouts are about the layers below it.
			file("both", "2"), file(".wh.both", ""), file(".wh..wh.plnk", "")),
	)
	wantTree(t, root, "becomes-file=2", "both=2", "etc/", "etc/becomes-dir/", "etc/becomes-dir/y=2", "etc/changed=2", "etc/keep=1",
		"no/", "no/parents/", "no/parents/named=2", "opq/", "opq/early=2", "opq/sub/", "opq/sub/late=2")
}

func TestAnOpaqueDirectoryClearsWhatThisLayerHasAlreadyEntered(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	apply(t, root,
		layer(t, dir("d/"), dir("d/sub/"), file("d/sub/old", "1"), file("d/old", "1")),
		layer(t, dir("d/"), dir("d/sub/"), file("d/sub/new", "2"), file("d/.wh..wh..opq", "")))
	wantTree(t, root, "d/", "d/sub/", "d/sub/new=2")
}

func TestNothingLeadsOutOfTheRoot(t *testing.T) {
	top := t.TempDir()
	root, outside := filepath.Join(top, "root"), filepath.Join(top, "outside")
	if err := os.WriteFile(outside, []byte("as it was"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, l := range map[string][]byte{
		"a path":                    layer(t, file("../outside", "x"), file("/../../outside", "x"), file("a/../../outside", "x")),
		"a link to above":           layer(t, link("up", "../.."), file("up/outside", "x")),
		"a link to an absolute":     layer(t, link("abs", top), file("abs/outside", "x")),
		"a link that is written to": layer(t, link("f", "../outside"), file("f", "x")),
		"a hard link":               layer(t, hard("h", "../outside")),
		"a hard link by a link":     layer(t, link("l", outside), hard("h", "l")),
		"a whiteout":                layer(t, link("up2", ".."), file("up2/.wh.outside", ""), file("../.wh.outside", "")),
		"a whiteout of above":       layer(t, file("a/.wh...", "")),
		"an opaque link":            layer(t, link("top", top), file("top/.wh..wh..opq", "")),
		"a directory":               layer(t, link("mode", outside), entry{tar.Header{Name: "mode", Typeflag: tar.TypeDir, Mode: 0}, ""}),
	} {
		t.Run(name, func(t *testing.T) {
			_, _ = unpack(t, root, l) // refused or harmless
			list, err := os.ReadDir(top)
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(outside)
			fi, err2 := os.Lstat(outside)
			if err != nil || err2 != nil || string(text) != "as it was" || fi.Mode() != 0o644 || len(list) != 2 || fi.Sys() == nil {
				t.Errorf("outside there is %q, %v, %v", text, err, list)
			}
			var st unix.Stat_t
			if err := unix.Lstat(outside, &st); err != nil || st.Nlink != 1 {
				t.Errorf("it has %d names, %v", st.Nlink, err)
			}
			if err := os.RemoveAll(root); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestOwnersModesTimesAndAttributesAreKept(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	at := time.Unix(1_600_000_000, 0)
	apply(t, root, layer(t,
		entry{tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 7, Gid: 8, ModTime: at}, ""},
		entry{tar.Header{Name: "d/su", Mode: 0o4755, Uid: 1234, Gid: 5678, ModTime: at,
			PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b", "SCHILY.xattr.trusted.x": "y"}}, "text"},
		entry{tar.Header{Name: "d/l", Linkname: "su", Typeflag: tar.TypeSymlink, Uid: 9, Gid: 9, ModTime: at}, ""},
		entry{tar.Header{Name: "d/p", Typeflag: tar.TypeFifo, Mode: 0o600}, ""},
		hard("d/again", "d/su"),
	))
	var st unix.Stat_t
	for name, want := range map[string]unix.Stat_t{
		"d": {Mode: unix.S_IFDIR | 0o1777, Uid: 7, Gid: 8}, "d/su": {Mode: unix.S_IFREG | 0o4755, Uid: 1234, Gid: 5678}, "d/l": {Mode: unix.S_IFLNK | 0o777, Uid: 9, Gid: 9},
	} {
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Fatal(err)
		}
		if st.Mode != want.Mode || st.Uid != want.Uid || st.Gid != want.Gid || st.Mtim.Sec != at.Unix() {
			t.Errorf("%s: mode %o, owner %d:%d, time %d", name, st.Mode, st.Uid, st.Gid, st.Mtim.Sec)
		}
	}
	buf := make([]byte, 10)
	if n, err := unix.Lgetxattr(filepath.Join(root, "d/again"), "user.a", buf); err != nil || string(buf[:n]) != "b" {
		t.Errorf("attribute: %q, %v", buf[:max(n, 0)], err)
	}
	if fi, err := os.Lstat(filepath.Join(root, "d/p")); err != nil || fi.Mode()&fs.ModeNamedPipe == 0 {
		t.Errorf("FIFO: %v, %v", fi, err)
	}
}

func TestDevicesAreLeftOut(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	out, err := unpack(t, root, layer(t,
		entry{tar.Header{Name: "disk", Typeflag: tar.TypeBlock, Mode: 0o666, Devmajor: 254}, ""},
		entry{tar.Header{Name: "mem", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 1}, ""}, file("f", "")))
	if err != nil || out != "3 2" {
		t.Errorf("%q, %v", out, err)
	}
	wantTree(t, root, "f=")
}

func TestBrokenLayersAreErrors(t *testing.T) {
	whole := layer(t, file("f", strings.Repeat("x", 4000)))
	for name, l := range map[string][]byte{
		"cut off": whole[:1500], "garbage": []byte(strings.Repeat("garbage ", 200)),
		"a hard link to nothing": layer(t, hard("h", "nothing")),
		"a file as a directory":  layer(t, file("f", ""), file("f/x", "")),
		"a name too long":        layer(t, file(strings.Repeat("n", 300), "")),
		"a loop":                 layer(t, link("a", "b"), link("b", "a"), file("a/x", "")),
	} {
		if out, err := unpack(t, filepath.Join(t.TempDir(), "root"), l); err == nil {
			t.Errorf("%s: no error, %s", name, out)
		}
	}
}

func TestASwitchThatIsCutOffGoesOn(t *testing.T) {
	write := func(p string) {
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, cut := range []string{"", "first", "second"} {
		t.Run(cut, func(t *testing.T) {
			top := t.TempDir()
			for _, f := range []string{"bin/old", "etc/old", "lost+found/x", ".wrenn-new/root/bin/new", ".wrenn-new/root/opt/new"} {
				write(filepath.Join(top, f))
			}
			if switched, err := Switch(top); switched || err != nil {
				t.Fatalf("without the mark: %v, %v", switched, err)
			}
			write(filepath.Join(top, ".wrenn-new/ready"))
			// As a switch is left that was cut off in one of its halves.
			var err error
			switch cut {
			case "first":
				err = errors.Join(os.Mkdir(filepath.Join(top, ".wrenn-old"), 0o700), os.Rename(filepath.Join(top, "bin"), filepath.Join(top, ".wrenn-old/bin")))
			case "second":
				err = os.Mkdir(filepath.Join(top, ".wrenn-old"), 0o700)
				for _, m := range [][2]string{{"bin", ".wrenn-old/bin"}, {"etc", ".wrenn-old/etc"}, {".wrenn-new/ready", ".wrenn-new/moved"}, {".wrenn-new/root/bin", "bin"}} {
					err = errors.Join(err, os.Rename(filepath.Join(top, m[0]), filepath.Join(top, m[1])))
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			if switched, err := Switch(top); !switched || err != nil {
				t.Fatalf("switched: %v, %v", switched, err)
			}
			wantTree(t, top, ".wrenn-new/", ".wrenn-new/root/", ".wrenn-old/", ".wrenn-old/bin/", ".wrenn-old/bin/old=", ".wrenn-old/etc/", ".wrenn-old/etc/old=",
				"bin/", "bin/new=", "lost+found/", "lost+found/x=", "opt/", "opt/new=")
			if switched, err := Switch(top); switched || err != nil {
				t.Errorf("a second time: %v, %v", switched, err)
			}
		})
	}
}

func TestTheUserIsMadeWhereThereIsNone(t *testing.T) {
	home := filepath.Join(t.TempDir(), "home")
	for name, c := range map[string]struct{ passwd, group, wantPasswd, wantGroup string }{
		"nothing": {"", "", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::" + home + ":/bin/bash\n", "root:x:0:\nuser:x:1000:\n"},
		"its number is taken": {"root:x:0:0::/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/bash", "root:x:0:\nsudo:x:27:\nwheel:x:10:node\nx:x:1001:\n",
			"root:x:0:0::/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/bash\nuser:x:1002:1002::" + home + ":/bin/bash\n",
			"root:x:0:\nsudo:x:27:user\nwheel:x:10:node,user\nx:x:1001:\nuser:x:1002:\n"},
		"the group is there": {"root:x:0:0::/root:/bin/sh\n", "user:x:77:\n", "root:x:0:0::/root:/bin/sh\nuser:x:1000:77::" + home + ":/bin/bash\n", "user:x:77:\n"},
		"it is there":        {"user:x:5:5::" + home + ":/bin/zsh\n", "user:x:5:\n", "user:x:5:5::" + home + ":/bin/zsh\n", "user:x:5:\n"},
	} {
		t.Run(name, func(t *testing.T) {
			etc := t.TempDir()
			for f, text := range map[string]string{"passwd": c.passwd, "group": c.group, "shadow": "root:*:1::::::\n"} {
				if err := os.WriteFile(filepath.Join(etc, f), []byte(text), 0o640); err != nil {
					t.Fatal(err)
				}
			}
			if err := ensureUser(etc, "user", home); err != nil {
				t.Fatal(err)
			}
			for f, want := range map[string]string{"passwd": c.wantPasswd, "group": c.wantGroup} {
				if got, err := os.ReadFile(filepath.Join(etc, f)); err != nil || string(got) != want {
					t.Errorf("%s is %q, %v; want %q", f, got, err, want)
				}
			}
			if fi, err := os.Stat(home); err != nil || !fi.IsDir() {
				t.Errorf("home: %v, %v", fi, err)
			}
			if err := os.RemoveAll(home); err != nil {
				t.Fatal(err)
			}
		})
	}
}
