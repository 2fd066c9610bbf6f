// Command envd is the guest agent: one static binary that is the sandbox's
// initrd (as /init, or "envd initrd"), its PID 1 ("envd init") and the service
// that the host talks to ("envd serve").
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
	case "version":
		fmt.Println(guest.Version)
	default:
		fmt.Fprintln(os.Stderr, "usage: envd initrd|init|serve|version")
		os.Exit(2)
	}
}
