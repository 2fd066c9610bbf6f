package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/client"
)

// output prints results in the form the caller asked for.
type output struct {
	w           io.Writer
	json, quiet bool
}

// addOutputFlags gives cmd and those below it --json and --quiet.
func addOutputFlags(cmd *cobra.Command) {
	f := cmd.PersistentFlags()
	f.Bool("json", false, "print JSON, in the API's own form")
	f.BoolP("quiet", "q", false, "print only IDs or names, one per line")
}

func outputOf(cmd *cobra.Command) output {
	o := output{w: cmd.OutOrStdout()}
	o.json, _ = cmd.Flags().GetBool("json")
	o.quiet, _ = cmd.Flags().GetBool("quiet")
	return o
}

func (o output) printJSON(v any) error {
	e := json.NewEncoder(o.w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

func (o output) lines(lines []string) error {
	for _, l := range lines {
		if _, err := fmt.Fprintln(o.w, l); err != nil {
			return err
		}
	}
	return nil
}

// table prints rows in columns under a heading.
func (o output) table(head []string, rows [][]string) error {
	tw := tabwriter.NewWriter(o.w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(head, "\t"))
	for _, r := range rows {
		for i := range r {
			r[i] = printable(r[i])
		}
		fmt.Fprintln(tw, strings.Join(r, "\t"))
	}
	return tw.Flush()
}

// fields prints "name: value" lines, without those that have no value.
func (o output) fields(pairs ...[2]string) error {
	tw := tabwriter.NewWriter(o.w, 0, 0, 2, ' ', 0)
	for _, p := range pairs {
		if p[1] != "" {
			fmt.Fprintf(tw, "%s:\t%s\n", p[0], printable(p[1]))
		}
	}
	return tw.Flush()
}

func (o output) sandboxes(list []client.Sandbox) error {
	if o.json {
		if list == nil {
			list = []client.Sandbox{} // an empty list is [], not null
		}
		return o.printJSON(client.SandboxPage{Sandboxes: list})
	}
	if o.quiet {
		ids := make([]string, len(list))
		for i, sb := range list {
			ids[i] = printable(sb.ID)
		}
		return o.lines(ids)
	}
	rows := make([][]string, len(list))
	for i, sb := range list {
		rows[i] = []string{sb.ID, sb.Template, sb.Status, strconv.Itoa(sb.VCPUs), mib(sb.MemoryMB),
			stamp(sb.CreatedAt), dash(stamp(sb.ExpiresAt)), dash(keyValues(sb.Metadata))}
	}
	return o.table([]string{"ID", "TEMPLATE", "STATUS", "VCPUS", "MEMORY", "CREATED", "EXPIRES", "METADATA"}, rows)
}

func (o output) sandbox(sb *client.Sandbox) error {
	if o.json {
		return o.printJSON(sb)
	}
	if o.quiet {
		return o.lines([]string{printable(sb.ID)})
	}
	timeout := "none"
	if sb.TimeoutSec > 0 {
		timeout = (time.Duration(sb.TimeoutSec) * time.Second).String()
		if sb.AutoPause {
			timeout += ", then paused"
		} else {
			timeout += ", then destroyed"
		}
	}
	return o.fields(
		[2]string{"ID", sb.ID}, [2]string{"Template", sb.Template}, [2]string{"Status", sb.Status},
		[2]string{"Error", sb.Error}, [2]string{"vCPUs", strconv.Itoa(sb.VCPUs)}, [2]string{"Memory", mib(sb.MemoryMB)},
		[2]string{"Timeout", timeout}, [2]string{"Created", stamp(sb.CreatedAt)}, [2]string{"Started", stamp(sb.StartedAt)},
		[2]string{"Last active", stamp(sb.LastActiveAt)}, [2]string{"Expires", stamp(sb.ExpiresAt)},
		[2]string{"Metadata", keyValues(sb.Metadata)},
	)
}

func (o output) snapshots(list []client.Snapshot) error {
	if o.json {
		if list == nil {
			list = []client.Snapshot{}
		}
		return o.printJSON(client.SnapshotPage{Snapshots: list})
	}
	if o.quiet {
		names := make([]string, len(list))
		for i, s := range list {
			names[i] = printable(s.Name)
		}
		return o.lines(names)
	}
	rows := make([][]string, len(list))
	for i, s := range list {
		rows[i] = []string{s.Name, s.Type, dash(vcpus(s.VCPUs)), dash(mib(s.MemoryMB)), size(s.SizeBytes),
			strconv.FormatInt(s.Generation, 10), dash(s.Parent), stamp(s.CreatedAt)}
	}
	return o.table([]string{"NAME", "TYPE", "VCPUS", "MEMORY", "SIZE", "GENERATION", "PARENT", "CREATED"}, rows)
}

func (o output) snapshot(s *client.Snapshot) error {
	if o.json {
		return o.printJSON(s)
	}
	if o.quiet {
		return o.lines([]string{printable(s.Name)})
	}
	return o.fields(
		[2]string{"Name", s.Name}, [2]string{"Type", s.Type}, [2]string{"vCPUs", vcpus(s.VCPUs)},
		[2]string{"Memory", mib(s.MemoryMB)}, [2]string{"Size", size(s.SizeBytes)},
		[2]string{"Generation", strconv.FormatInt(s.Generation, 10)}, [2]string{"Parent", s.Parent},
		[2]string{"Created", stamp(s.CreatedAt)},
	)
}

// mib and vcpus print nothing for 0: a base template fixes neither.
func mib(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n) + " MiB"
}

func vcpus(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// size prints bytes in binary units, to three digits or so.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return strconv.FormatInt(n, 10) + " B"
	}
	v, i := float64(n)/1024, 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[i])
}

func keyValues(m map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, k+"="+m[k])
	}
	return strings.Join(parts, ",")
}

// printable keeps text that others chose (metadata, file names, errors) from
// steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '\uFFFD'
	}, s)
}
