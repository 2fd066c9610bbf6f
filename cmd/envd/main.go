// Command envd is the guest agent: one static binary that is the sandbox's
// initrd (as /init, or "envd initrd"), its PID 1 ("envd init") and the service
// that the host talks to ("envd serve"). Three more verbs make a container
// image's file system the sandbox's own; package rootfs has them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guest/boot"
	"git.omukk.dev/wrenn/sandbox/internal/guest/rootfs"
)

func main() {
	mode := ""
	switch {
	case os.Getpid() == 1 && filepath.Base(os.Args[0]) == "init":
		mode = "initrd" // whatever arguments the kernel's command line adds
	case len(os.Args) == 2:
		mode = os.Args[1]
	}
	switch mode {
	case "initrd":
		boot.Initrd()
	case "init":
		boot.Init()
	case "serve":
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
		err := guest.Serve(ctx, guest.Options{})
		stop()
		if err != nil {
			fmt.Fprintln(os.Stderr, "envd:", err)
			os.Exit(1)
		}
	case "unpack-layer", "adopt-root", "drop-old-root":
		if err := takeImage(mode); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "version":
		fmt.Println(guest.Version)
	default:
		fmt.Fprintln(os.Stderr, "usage: envd initrd|init|serve|version")
		os.Exit(2)
	}
}

// takeImage does one step of taking an image; a layer comes by standard input.
func takeImage(step string) error {
	switch step {
	case "adopt-root":
		return rootfs.Adopt()
	case "drop-old-root":
		return rootfs.Drop()
	}
	n, err := rootfs.Unpack(rootfs.NewRoot, os.Stdin)
	if err == nil && n.Devices > 0 {
		fmt.Printf("%d devices of the layer are left out\n", n.Devices)
	}
	return err
}
