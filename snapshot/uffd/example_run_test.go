//go:build linux && amd64

package uffd_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// The example's own code, with a real userfaultfd and a process of the test's
// that maps memory as a VMM does: it sees the image, and what it writes is the
// next generation.
func TestTheExampleRuns(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it attaches to a process by ptrace and makes a userfaultfd for kernel faults")
	}
	ctx := t.Context()
	store, err := snapshot.Open(filepath.Join(t.TempDir(), "store"), snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	content := make([]byte, 4<<20)
	r := rand.New(rand.NewPCG(1, 2))
	for i := 1 << 20; i < len(content); i++ { // the first MiB is zeros
		content[i] = byte(r.Uint32())
	}
	img := firstImage(t, store, content)
	defer img.Close()

	m := &machine{}
	defer m.end()
	record := filepath.Join(t.TempDir(), "machine.json")
	err = restore(ctx, store, img, record, m.start, func() error {
		if got, want := m.do("sum 0 %d", len(content)), fmt.Sprintf("%x", sha256.Sum256(content)); got != want {
			return fmt.Errorf("the machine sees memory with digest %q, want %s", got, want)
		}
		for _, at := range []int{5, 2<<20 + 7, len(content) - 1} {
			content[at] = 77
			if got := m.do("poke %d 77", at); got != "ok" {
				return fmt.Errorf("the machine wrote: %q", got)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(record); err != nil || len(b) == 0 {
		t.Fatalf("no record is kept: %v", err)
	}
	manifests, errs := store.Manifests()
	if len(manifests) != 2 || len(errs) > 0 {
		t.Fatalf("%d manifests, %v", len(manifests), errs)
	}
	for _, mf := range manifests {
		if mf.Memory.ID == img.ID() {
			continue
		}
		next, err := store.OpenImage(mf.Memory.ID)
		if err != nil {
			t.Fatal(err)
		}
		defer next.Close()
		got := make([]byte, len(content))
		if _, err := next.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
			t.Fatalf("the next generation is not what the machine had (%v)", err)
		}
	}
}

// firstImage commits an image and opens it.
func firstImage(t *testing.T, store *snapshot.Store, content []byte) *snapshot.Image {
	t.Helper()
	w, err := store.NewImage(int64(len(content)), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := w.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	id, err := w.Finish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	txn, err := store.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer txn.Abort()
	if err := txn.Commit(t.Context(), snapshot.Manifest{Kind: snapshot.KindSnapshot, Memory: snapshot.ImageRef{ID: id}}); err != nil {
		t.Fatal(err)
	}
	img, err := store.OpenImage(id)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// machine is this test's binary as a process that maps memory and obeys.
type machine struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func (m *machine) start(mem string, _ int64) (int, error) {
	f, err := os.OpenFile(mem, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"UFFD_TEST_VICTIM=1"}
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{f}
	if m.in, err = cmd.StdinPipe(); err != nil {
		return 0, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	m.out = bufio.NewReader(out)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	m.cmd = cmd
	if line, err := m.out.ReadString('\n'); err != nil || line != "ready\n" {
		return 0, fmt.Errorf("the machine says %q, %w", line, err)
	}
	return cmd.Process.Pid, nil
}

// do sends a command and returns the answer.
func (m *machine) do(format string, args ...any) string {
	if _, err := fmt.Fprintf(m.in, format+"\n", args...); err != nil {
		return err.Error()
	}
	line, err := m.out.ReadString('\n')
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(line)
}

func (m *machine) end() {
	if m.cmd == nil {
		return
	}
	_ = m.cmd.Process.Kill()
	_ = m.cmd.Wait()
}
