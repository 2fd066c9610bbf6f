package nbd_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/snapshot/block"
	"git.omukk.dev/wrenn/sandbox/snapshot/nbd"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// An overlay over an image (here 1 GiB of zeros) is served to one machine, for
// example to
//
//	qemu-system-x86_64 … -blockdev driver=nbd,node-name=disk,reconnect-delay=60,\
//	    server.type=unix,server.path=/run/disk.sock,export=disk
//
// The overlay is opened again by the next process when this one has died; the
// machine finds the new socket by itself.
func ExampleServe() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	disk, err := block.OpenOverlay(storage.OS{}, filepath.Join(dir, "disk"), block.Zeros(1<<30))
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	l, err := net.Listen("unix", filepath.Join(dir, "disk.sock"))
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- nbd.Serve(ctx, l, disk, nbd.Options{Name: "disk", Exclusive: true}) }()

	// …the machine runs…

	stop()
	if err := <-ended; err != nil { // no request is at work any more
		log.Fatal(err)
	}
	if err := disk.Flush(); err != nil {
		log.Fatal(err)
	}
	fmt.Println("served", disk.Size()>>20, "MiB")
	// Output: served 1024 MiB
}
