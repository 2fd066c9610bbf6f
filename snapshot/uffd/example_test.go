//go:build linux && amd64

package uffd_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"os/exec"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// A machine is restored from a memory image without reading it first. It needs
// root, and a VMM that maps guest memory from a file and does not touch it
// before it is attached. TestTheExampleRuns runs it with another machine.
func Example() {
	ctx := context.Background()
	store, err := snapshot.Open("/var/lib/example/store", snapshot.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	id, err := format.ParseID(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	img, err := store.OpenImage(id)
	if err != nil {
		log.Fatal(err)
	}
	defer img.Close()
	// The machine is told to go on, and later to stand still again.
	live := func() error { return nil }
	if err := restore(ctx, store, img, "/var/lib/example/machine.json", startMachine, live); err != nil {
		log.Fatal(err)
	}
}

// restore starts a machine from an image, lets it live, and keeps what it has
// written as the next generation.
func restore(ctx context.Context, store *snapshot.Store, img *snapshot.Image, record string,
	start func(mem string, size int64) (pid int, err error), live func() error) error {
	// Once for the image, for all machines that start from it.
	shared, err := uffd.NewShared("memory-"+img.ID().String(), img)
	if err != nil {
		return err
	}
	defer shared.Close()
	server, err := uffd.NewServer(uffd.Options{OnFatal: func(id string, err error) {
		log.Printf("machine %s was killed, a page of it cannot be had: %v", id, err)
	}})
	if err != nil {
		return err
	}
	defer server.Close()

	pid, err := start(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), shared.File().Fd()), shared.Size())
	if err != nil {
		return err
	}
	a, err := uffd.Inject(ctx, pid, shared, -1)
	if err != nil {
		return err
	}
	// For the process after this one: uffd.Reattach goes on from it.
	b, err := json.Marshal(a.Record())
	if err != nil {
		return err
	}
	if err := os.WriteFile(record, b, 0o600); err != nil {
		return err
	}
	if err := server.Add("machine", a); err != nil {
		return err
	}
	if err := live(); err != nil {
		return err
	}
	if err := capture(ctx, store, img, a.Record()); err != nil {
		return err
	}
	return server.Remove("machine") // when it has ended
}

// capture writes the pages that are the machine's own as a generation after img,
// and names it.
func capture(ctx context.Context, store *snapshot.Store, img *snapshot.Image, rec uffd.AttachmentRecord) error {
	w, err := store.NewImage(img.Size(), img)
	if err != nil {
		return err
	}
	defer w.Abort()
	mem, err := uffd.ReadMemory(rec.PID, rec.Addr)
	if err != nil {
		return err
	}
	defer mem.Close()
	buf := make([]byte, 1<<20)
	err = uffd.ScanDirty(rec.PID, rec.Addr, rec.Length, func(off, n int64) error {
		for end := off + n; off < end; {
			p := buf[:min(int64(len(buf)), end-off)]
			if _, err := mem.ReadAt(p, off); err != nil {
				return err
			}
			if err := w.WriteAt(p, off); err != nil {
				return err
			}
			off += int64(len(p))
		}
		return nil
	})
	if err != nil {
		return err
	}
	id, err := w.Finish(ctx)
	if err != nil {
		return err
	}
	txn, err := store.Begin()
	if err != nil {
		return err
	}
	defer txn.Abort()
	return txn.Commit(ctx, snapshot.Manifest{Kind: snapshot.KindPause, Memory: snapshot.ImageRef{ID: id}})
}

// startMachine starts a VMM that waits for its state, with the file as guest
// memory.
func startMachine(mem string, size int64) (pid int, err error) {
	cmd := exec.Command("qemu-system-x86_64", "-nodefaults", "-display", "none",
		"-machine", "microvm,memory-backend=ram", "-m", fmt.Sprint(size>>20),
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%d,mem-path=%s,share=on", size, mem),
		"-incoming", "defer", "-qmp", "unix:/run/example.qmp,server=on,wait=off")
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	return cmd.Process.Pid, nil
}
