package engine

import (
	"os"
	"path/filepath"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

func TestAVMOfACopiedJournalIsKnown(t *testing.T) {
	root := t.TempDir()
	dir := func(name string) string {
		d := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Join(d, "jail", "root"), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, control := range []string{"qmp.sock", "jail/root/api.sock"} {
			if err := os.WriteFile(filepath.Join(d, control), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return d
	}
	original, backup := dir("original"), dir("copy")
	link := filepath.Join(root, "link")
	if err := os.Symlink(original, link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, dir, control string
		want               bool
	}{
		{"its own", original, original + "/qmp.sock", false},
		{"its own, in a jail", original, original + "/jail/root/api.sock", false},
		{"its own, by another name", link, original + "/qmp.sock", false},
		{"the original's", backup, original + "/qmp.sock", true},
		{"the original's, in a jail", backup, original + "/jail/root/api.sock", true},
		{"one that is gone, as after a move", backup, root + "/moved/qmp.sock", false},
		{"none", backup, "", false},
	} {
		if got := vmElsewhere(c.dir, &vmm.Record{Control: c.control}); got != c.want {
			t.Errorf("%s: elsewhere is %v, want %v", c.name, got, c.want)
		}
	}
	if vmElsewhere(backup, nil) {
		t.Error("no VM at all is elsewhere")
	}
}
