package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"
)

// report prints results as they come, as a Markdown table.
type report struct {
	w     io.Writer
	log   string // the server's, which tells how VMs run
	begun bool
}

// begin prints the head, with the machine, once the server's log can tell.
func (r *report) begin() {
	if r.begun {
		return
	}
	r.begun = true
	fmt.Fprintf(r.w, "Machine: %s, %d cores, Linux %s, %s, %s\n\n", cpuModel(), runtime.NumCPU(), firstLine("uname", "-r"),
		firstLine("qemu-system-x86_64", "--version"), acceleration(r.log))
	fmt.Fprintln(r.w, "| figure | value | promise | holds |")
	fmt.Fprintln(r.w, "| --- | --- | --- | --- |")
}

// row prints a figure beside its promise; holds is empty where none is made.
func (r *report) row(figure, value, promise string, holds bool) {
	r.begin()
	verdict := "no"
	switch {
	case promise == "":
		verdict = ""
	case holds:
		verdict = "yes"
	}
	fmt.Fprintf(r.w, "| %s | %s | %s | %s |\n", figure, value, promise, verdict)
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown CPU"
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if k, v, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown CPU"
}

// acceleration reads from the server's log how VMs run.
func acceleration(log string) string {
	b, _ := os.ReadFile(log)
	if len(b) == 0 {
		return "no VM run"
	}
	if strings.Contains(string(b), "accelerator=kvm") {
		return "KVM"
	}
	return "TCG (emulation, no KVM)"
}

func firstLine(name string, args ...string) string {
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		return name + ": not found"
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

// samples are measurements of one figure.
type samples []time.Duration

func (s samples) median() time.Duration {
	if len(s) == 0 {
		return 0
	}
	c := slices.Sorted(slices.Values(s))
	return c[len(c)/2]
}

func (s samples) String() string {
	if len(s) == 0 {
		return "-"
	}
	return fmt.Sprintf("median %d ms (%d to %d, n=%d)", s.median().Milliseconds(),
		slices.Min(s).Milliseconds(), slices.Max(s).Milliseconds(), len(s))
}

func ratio(a, b samples) float64 { return float64(a.median()) / float64(b.median()) }
