package templatebuild

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The script itself, on this machine, in a directory of the test's.
func TestCopyScript(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.TempDir() // the client's build context
	for name, content := range map[string]string{
		"a.txt": "a", "b.txt": "b", "src/one.py": "1", "src/sub/two.py": "2", "src/.hidden": "h", "we ird/x y.txt": "w",
	} {
		p := filepath.Join(ctx, name)
		if err := errorsJoin(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("a.txt", filepath.Join(ctx, "link")); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, src, dest, mode string
		files                 []string // what is in the archive
		want                  string   // path=content of all that is there, sorted; "" is a failure
	}{
		{"file to file", "a.txt", "new/c.txt", "", []string{"a.txt"}, "new/c.txt=a"},
		{"file to directory", "a.txt", "new/", "", []string{"a.txt"}, "new/a.txt=a"},
		{"file to directory that is there", "a.txt", "there", "", []string{"a.txt"}, "there/a.txt=a"},
		{"directory", "src", "app", "", []string{"src"}, "app/.hidden=h app/one.py=1 app/sub/two.py=2"},
		{"directory with slashes", "./src/", "app/", "", []string{"src"}, "app/.hidden=h app/one.py=1 app/sub/two.py=2"},
		{"context", ".", "app", "", []string{"a.txt", "src/sub"}, "app/a.txt=a app/src/sub/two.py=2"},
		{"pattern", "*.txt", "app", "", []string{"a.txt", "b.txt"}, "app/a.txt=a app/b.txt=b"},
		{"deep pattern", "src/**/*.py", "app", "", []string{"src"}, "app/one.py=1 app/two.py=2"},
		{"spaces", "we ird/x y.txt", "o ut/", "", []string{"we ird/x y.txt"}, "o ut/x y.txt=w"},
		{"mode", "a.txt", "x.sh", "0755", []string{"a.txt"}, "x.sh=a"},
		{"link", "link", "l/", "", []string{"link"}, "l/link->a.txt"},
		{"nothing matches", "*.md", "app", "", []string{"a.txt"}, ""},
		{"no archive", "a.txt", "app", "", nil, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.Mkdir(filepath.Join(root, "there"), 0o755); err != nil {
				t.Fatal(err)
			}
			archive := filepath.Join(t.TempDir(), "files.tar")
			if tc.files != nil {
				if out, err := exec.Command("tar", append([]string{"-C", ctx, "-czf", archive, "--"}, tc.files...)...).CombinedOutput(); err != nil {
					t.Fatalf("tar: %v: %s", err, out)
				}
			}
			dest := filepath.Join(root, tc.dest)
			if strings.HasSuffix(tc.dest, "/") {
				dest += "/"
			}
			cmd := exec.Command("/bin/bash", "-c", copyScript, "wrenn", dest, me.Username+":", archive, tc.src, tc.mode)
			out, err := cmd.CombinedOutput()
			if tc.want == "" {
				if err == nil || len(bytes.TrimSpace(out)) == 0 {
					t.Fatalf("error %v, said %q", err, out)
				}
				return
			}
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if got := tree(t, root); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
			if fi, _ := os.Stat(filepath.Join(root, "x.sh")); tc.mode != "" && fi.Mode() != 0o755 {
				t.Errorf("mode %v", fi.Mode())
			}
			if _, err := os.Stat(archive); err == nil {
				t.Error("the archive is left")
			}
		})
	}
}

func errorsJoin(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func tree(t *testing.T, root string) string {
	var all []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, _ := filepath.Rel(root, p)
		if to, err := os.Readlink(p); err == nil {
			all = append(all, name+"->"+to)
			return nil
		}
		b, err := os.ReadFile(p)
		all = append(all, name+"="+string(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}
