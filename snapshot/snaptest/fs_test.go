package snaptest

import (
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

func TestFSConforms(t *testing.T) {
	t.Run("os", func(t *testing.T) { RunFS(t, storage.OS{}, t.TempDir()) })
	t.Run("memory", func(t *testing.T) {
		f := NewFS()
		if err := f.Mkdir("/dir"); err != nil {
			t.Fatal(err)
		}
		RunFS(t, f, "/dir")
	})
}

func TestCrashLosesWhatWasNotSynced(t *testing.T) {
	f := NewFS()
	write := func(name, content string, sync bool) {
		h, err := f.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
		if sync {
			if err := h.Sync(); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
	}
	write("/kept", "1", true)
	write("/empty", "2", false)
	if err := f.SyncDir("/"); err != nil {
		t.Fatal(err)
	}
	write("/nameless", "3", true)
	if err := f.Remove("/kept"); err != nil {
		t.Fatal(err)
	}
	c := f.Crash(nil)
	if got := len(c.Files()); got != 2 {
		t.Fatalf("after the crash: %q, want /empty and /kept", c.Files())
	}
	if string(c.Content("/kept")) != "1" || len(c.Content("/empty")) != 0 {
		t.Fatalf("contents %q and %q, want %q and none", c.Content("/kept"), c.Content("/empty"), "1")
	}
	if got := f.Restart().Files(); len(got) != 2 || got[1] != "/nameless" {
		t.Fatalf("after a restart: %q, want /empty and /nameless", got)
	}
	all := f.Crash(func(string) bool { return true })
	if string(all.Content("/empty")) != "2" || string(all.Content("/nameless")) != "3" {
		t.Fatal("a crash that loses nothing lost something")
	}
}
