// Command testmain stands in for envd where boot is tested: the same modes, and
// a service that answers /health and, on /run, runs the request's body as a
// script of the user named by ?user=.
package main

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/internal/guest/boot"
)

func main() {
	mode := ""
	if len(os.Args) > 1 {
		mode = os.Args[1]
	}
	if filepath.Base(os.Args[0]) == "init" && mode == "" {
		mode = "initrd"
	}
	switch mode {
	case "initrd":
		boot.Initrd()
	case "init":
		boot.Init()
	case "serve":
		serve()
	default:
		fmt.Fprintln(os.Stderr, "usage: testmain initrd|init|serve")
		os.Exit(2)
	}
}

func serve() {
	uptime, err := os.ReadFile("/proc/uptime")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("testmain serve: up at %s", uptime)
	http.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	http.HandleFunc("POST /run", run)
	fmt.Fprintln(os.Stderr, http.ListenAndServe(":49983", nil))
	os.Exit(1)
}

func run(w http.ResponseWriter, r *http.Request) {
	cmd := exec.CommandContext(r.Context(), "/usr/bin/sudo", "-n", "-u", r.URL.Query().Get("user"), "-i", "/bin/bash", "-s")
	cmd.Stdin = r.Body
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		out = fmt.Appendf(out, "\n%v\n", err)
	}
	w.Write(out)
}
