package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// documented gives the commands that docs/operations.md shows under a mark.
func documented(t *testing.T, mark string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)<!-- test: " + mark + " -->\n```sh\n(.*?)```").FindSubmatch(text)
	if m == nil {
		t.Fatalf("docs/operations.md has no block %q", mark)
	}
	return string(m[1])
}

// asDocumented runs a block with the variables that it names.
func asDocumented(t *testing.T, mark string, env ...string) {
	t.Helper()
	cmd := exec.CommandContext(timeout(t, 5*time.Minute), "bash", "-euc", documented(t, mark))
	cmd.Env = append(os.Environ(), "PATH="+harness.Bin()+":"+os.Getenv("PATH"))
	cmd.Env = append(cmd.Env, env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s as the docs say: %v\n%s", mark, err, out)
	}
}

// TestBackupAndRestoreAsTheDocsSay runs the commands of docs/operations.md.
func TestBackupAndRestoreAsTheDocsSay(t *testing.T) {
	s := warmServer(t)
	running, paused := spawn(t, s).ID, create(t, s, client.CreateSandboxRequest{Template: warm, Metadata: map[string]string{"k": "v"}}).ID
	was := map[string]keeperAnswer{running: ask(t, s, running, "set "+running), paused: ask(t, s, paused, "set "+paused)}
	sh(t, s, paused, "echo before > /home/user/f")
	pause(t, s, paused)
	vm := s.VM(running).PID

	backup, restored := filepath.Join(harness.DevDir(), "e-backup"), filepath.Join(harness.DevDir(), "e-restored")
	for _, dir := range []string{backup, restored} {
		os.RemoveAll(dir) // of a run that was cut off
		t.Cleanup(func() { os.RemoveAll(dir) })
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	asDocumented(t, "backup", "WRENN_DIR="+s.Dir, "BACKUP="+backup)
	restart(t, s, running)

	// What happens afterwards does not reach into the backup.
	resume(t, s, paused)
	sh(t, s, paused, "echo after > /home/user/f")
	ask(t, s, paused, "remake")
	pause(t, s, paused)
	after := spawn(t, s).ID
	snapshot(t, s, after, "after")

	t.Run("restore", func(t *testing.T) {
		asDocumented(t, "restore", "BACKUP="+backup, "RESTORED="+restored)
		r := ownServerIn(t, restored)
		sb, err := r.GetSandbox(t.Context(), paused)
		if err != nil || sb.Status != client.StatusPaused || sb.Metadata["k"] != "v" {
			t.Fatalf("the paused sandbox is %+v, %v", sb, err)
		}
		resume(t, r, paused)
		if a := ask(t, r, paused, "stat"); a.PID != was[paused].PID || a.Made != was[paused].Made || a.Value != paused {
			t.Errorf("the keeper says %+v, was %+v", a, was[paused])
		}
		if f := sh(t, r, paused, "cat /home/user/f"); f != "before" {
			t.Errorf("the file holds %q", f)
		}
		spawn(t, r)
		if sb, err := r.GetSandbox(t.Context(), running); err != nil || sb.Status != client.StatusError || sb.Error == "" {
			t.Errorf("the one that ran is %+v, %v; want error, with the reason", sb, err)
		}
		remove(t, r, running)
		if _, err := r.GetSnapshot(t.Context(), "after"); !client.IsNotFound(err) {
			t.Errorf("a snapshot that came later: %v", err)
		}
	})
	// The server that the backup was made of, and its VM, were not touched.
	if now := s.VM(running); now == nil || now.PID != vm {
		t.Fatalf("the VM's process was %d and is %+v", vm, now)
	}
	if a := ask(t, s, running, "stat"); a.PID != was[running].PID || a.Value != running {
		t.Errorf("the running one says %+v, was %+v", a, was[running])
	}
	t.Run("an older database", func(t *testing.T) {
		s.Kill()
		for _, f := range databaseOf(t, s.Dir) {
			os.Remove(f)
		}
		for _, f := range databaseOf(t, backup) {
			if out, err := exec.Command("cp", f, s.Dir).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		restart(t, s, running)
		states(t, s, map[string]string{running: client.StatusRunning, paused: client.StatusPaused, after: client.StatusRunning})
		if _, err := s.GetSnapshot(t.Context(), "after"); err != nil {
			t.Errorf("the snapshot that it does not know: %v", err)
		}
	})
	t.Run("a newer database", func(t *testing.T) {
		lost := spawn(t, s).ID
		pause(t, s, lost)
		s.Kill()
		// Of what the host had of it nothing is left, its pause included.
		for _, dir := range append(pausesOf(t, s.Dir, lost), filepath.Join(s.Dir, "sandboxes", lost)) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
		restart(t, s, running)
		states(t, s, map[string]string{running: client.StatusRunning, paused: client.StatusPaused, after: client.StatusRunning, lost: client.StatusError})
		remove(t, s, lost)
	})
	t.Run("a lost database", func(t *testing.T) {
		s.Kill()
		asDocumented(t, "lost database", "WRENN_DIR="+s.Dir)
		restart(t, s, running)
		states(t, s, map[string]string{running: client.StatusRunning, paused: client.StatusPaused, after: client.StatusRunning})
		if sb, err := s.GetSandbox(t.Context(), paused); err != nil || sb.Metadata["k"] != "v" {
			t.Errorf("the metadata: %+v, %v", sb, err)
		}
	})
	if now := s.VM(running); now == nil || now.PID != vm {
		t.Errorf("the VM's process was %d and is %+v", vm, now)
	}
	if a := ask(t, s, running, "stat"); a.PID != was[running].PID || a.Value != running {
		t.Errorf("the running one says %+v, was %+v", a, was[running])
	}
	resume(t, s, paused)
	if a := ask(t, s, paused, "stat"); a.PID != was[paused].PID || a.Value != paused {
		t.Errorf("the paused one says %+v, was %+v", a, was[paused])
	}
	if f := sh(t, s, paused, "cat /home/user/f"); f != "after" {
		t.Errorf("the file holds %q", f)
	}
}

// pausesOf finds the directories of a sandbox's pauses.
func pausesOf(t *testing.T, dir, id string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "store/snapshots/*/manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		if text, err := os.ReadFile(f); err == nil && strings.Contains(string(text), `"kind":"pause","sandbox_id":"`+id+`"`) {
			out = append(out, filepath.Dir(f))
		}
	}
	if len(out) == 0 {
		t.Fatalf("%s has no pause", id)
	}
	return out
}

func databaseOf(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "wrenn.db*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no database in %s: %v", dir, err)
	}
	return files
}

// states waits until the server has these sandboxes in these states, and no
// other.
func states(t *testing.T, s *harness.Server, want map[string]string) {
	t.Helper()
	var have string
	if !harness.Eventually(time.Minute, func() bool {
		page, err := s.ListSandboxes(t.Context(), client.ListSandboxesOptions{})
		if err != nil {
			have = err.Error()
			return false
		}
		wrong := len(page.Sandboxes) != len(want)
		var all []string
		for _, sb := range page.Sandboxes {
			wrong = wrong || sb.Status != want[sb.ID]
			all = append(all, fmt.Sprintf("%s is %s (%s)", sb.ID, sb.Status, sb.Error))
		}
		have = strings.Join(all, ", ")
		return !wrong
	}) {
		t.Fatalf("there are: %s; want %v", have, want)
	}
}
