package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
)

// row is one line of what the demo did.
type row struct {
	step    string
	took    time.Duration
	written int64 // bytes in the store; -1: does not apply
	private int64 // bytes of guest memory that the sandbox alone owns; -1: does not apply
	note    string
}

// table collects the rows as the demo goes.
type table struct {
	w    io.Writer
	rows []row
}

// say prints a step as it happens.
func (t *table) say(r row) {
	t.rows = append(t.rows, r)
	fmt.Fprintf(t.w, "  %-46s %9s  %s\n", r.step, duration(r.took), r.note)
}

// print shows all rows.
func (t *table) print() {
	fmt.Fprintln(t.w)
	tw := tabwriter.NewWriter(t.w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, pad("STEP")+"\tTIME\tWRITTEN\tPRIVATE MEMORY\t")
	for _, r := range t.rows {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t\n", pad(r.step), duration(r.took), size(r.written), size(r.private))
	}
	tw.Flush()
}

// pad keeps step names left-aligned in a right-aligned table.
func pad(s string) string { return s + strings.Repeat(" ", max(0, 46-len(s))) }

func duration(d time.Duration) string {
	switch {
	case d == 0:
		return "-"
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

func size(n int64) string {
	if n < 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}
