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
// before it is attached.
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

	// Once for the image, for all machines that start from it.
	shared, err := uffd.NewShared("memory-"+img.ID().String(), img)
	if err != nil {
		log.Fatal(err)
	}
	defer shared.Close()
	server, err := uffd.NewServer(uffd.Options{OnFatal: func(id string, err error) {
		log.Printf("machine %s was killed, a page of it cannot be had: %v", id, err)
	}})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()

	pid, err := startMachine(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), shared.File().Fd()), shared.Size())
	if err != nil {
		log.Fatal(err)
	}
	a, err := uffd.Inject(ctx, pid, shared, -1)
	if err != nil {
		log.Fatal(err)
	}
	// For the process after this one: uffd.Reattach goes on from it.
	record, err := json.Marshal(a.Record())
	if err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile("/var/lib/example/machine.json", record, 0o600); err != nil {
		log.Fatal(err)
	}
	if err := server.Add("machine", a); err != nil {
		log.Fatal(err)
	}

	// …the machine is told to go on. Later it stands still again, and what it
	// has written becomes the next generation:
	if err := capture(ctx, store, img, a.Record()); err != nil {
		log.Fatal(err)
	}
	if err := server.Remove("machine"); err != nil { // when it has ended
		log.Fatal(err)
	}
}

// capture writes the pages that are the machine's own as a generation after img.
// A Txn then names it, as in the example of package snapshot.
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
	_, err = w.Finish(ctx)
	return err
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
