package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// Bounds of a bundle.
const (
	bundlePart  = 1 << 20   // of one entry
	bundleLog   = 256 << 10 // the end of one log
	bundleFiles = 2000      // journals, manifests, lines of the list of files
)

const bundleReadme = `A bundle of "wrenn doctor" for a report of a fault.

It holds versions, what the host can do, the server's flags, what the journals
and manifests say of sandboxes and snapshots, the ends of the logs of pager and
VMs' processes, metrics and the list of files in the state directory.

It holds no keys, tokens, environments or metadata of sandboxes, nothing of the
database, no memory, no disk and nothing that a guest wrote on its console. Names
of templates, snapshots and sandboxes are in it. The server's own log goes where
its standard error goes ("journalctl -u wrenn" under systemd): it is not here.

What could not be had is named in missing.txt.
`

// bundle writes a tar.gz. What cannot be had is noted and left out: a bundle is
// for hosts on which something is wrong.
type bundle struct {
	tar     *tar.Writer
	now     time.Time
	secrets *strings.Replacer
	missing bytes.Buffer
}

// writeBundle makes a bundle of a state directory in a new file.
func writeBundle(ctx context.Context, name, dir, url string, findings []finding) (err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return usagef("--bundle %s: there is such a file already; choose another name", name)
	}
	if err != nil {
		return fmt.Errorf("create the bundle: %w", err)
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(name)
		}
	}()
	z := gzip.NewWriter(f)
	b := &bundle{tar: tar.NewWriter(z), now: time.Now(), secrets: secretsOf(dir)}
	if err := b.all(ctx, dir, url, findings); err != nil {
		return fmt.Errorf("write the bundle: %w", err)
	}
	if err := errors.Join(b.tar.Close(), z.Close()); err != nil {
		return fmt.Errorf("write the bundle: %w", err)
	}
	return nil
}

func (b *bundle) all(ctx context.Context, dir, url string, findings []finding) error {
	parts := []func() error{
		func() error { return b.add("README.txt", []byte(bundleReadme)) },
		func() error {
			return b.addJSON("about.json", map[string]any{
				"version": version(), "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH,
				"at": b.now.UTC(), "dir": dir, "server": serverFlags(dir),
			})
		},
		func() error { return b.addJSON("findings.json", findings) },
		func() error { return b.host() },
		func() error { return b.records(dir) },
		func() error { return b.logs(dir) },
		func() error { return b.files(dir) },
		func() error { return b.server(ctx, url) },
		func() error { return b.add("missing.txt", b.missing.Bytes()) },
	}
	for _, part := range parts {
		if err := part(); err != nil {
			return err
		}
	}
	return nil
}

func (b *bundle) miss(name string, err error) { fmt.Fprintf(&b.missing, "%s: %v\n", name, err) }

// add writes one entry, bounded, and without any secret that is known. What goes
// in is chosen to hold none; this is for what slips through, as a text of an
// error might.
func (b *bundle) add(name string, content []byte) error {
	if len(content) > bundlePart {
		content = append(content[:bundlePart:bundlePart], "\n[cut off]\n"...)
	}
	text := b.secrets.Replace(string(content))
	err := b.tar.WriteHeader(&tar.Header{Name: "wrenn-doctor/" + name, Mode: 0o600, Size: int64(len(text)), ModTime: b.now})
	if err == nil {
		_, err = io.WriteString(b.tar, text)
	}
	return err
}

func (b *bundle) addJSON(name string, v any) error {
	text, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	return b.add(name, append(text, '\n'))
}

// host has what the kernel says of itself.
func (b *bundle) host() error {
	for _, path := range []string{"/proc/version", "/proc/meminfo", "/proc/loadavg", "/proc/pressure/memory", "/proc/pressure/io", "/etc/os-release"} {
		text, err := os.ReadFile(path)
		if err != nil {
			b.miss(path, err)
			continue
		}
		if err := b.add("host/"+strings.ReplaceAll(path[1:], "/", "-"), text); err != nil {
			return err
		}
	}
	return nil
}

// journalView is what a bundle takes of a journal: no token, no environment, no
// metadata, and nothing that a later version adds.
type journalView struct {
	Version    int        `json:"version"`
	ID         string     `json:"id"`
	Template   string     `json:"template"`
	VCPUs      int        `json:"vcpus"`
	MemoryMB   int        `json:"memory_mb"`
	State      string     `json:"state"`
	Error      string     `json:"error,omitempty"`
	CreatedAt  time.Time  `json:"created_at"`
	StartedAt  *time.Time `json:"started_at,omitempty"`
	Manifest   string     `json:"manifest"`
	Generation uint64     `json:"generation"`
	Pending    string     `json:"pending"`
	Run        *struct {
		Slot        int    `json:"slot"`
		MemoryImage string `json:"memory_image"`
		DiskImage   string `json:"disk_image"`
		LastMemory  string `json:"last_memory"`
		LastDisk    string `json:"last_disk"`
		VM          *struct {
			Kind      string `json:"kind"`
			PID       int    `json:"pid"`
			StartTime uint64 `json:"start_time"`
			BootID    string `json:"boot_id"`
		} `json:"vm,omitempty"`
	} `json:"run,omitempty"`
}

// manifestView is what a bundle takes of a manifest, which its file wraps.
type manifestView struct {
	Version  int          `json:"version"`
	Manifest manifestBody `json:"manifest"`
}

type manifestBody struct {
	ID            string          `json:"id"`
	Name          string          `json:"name"`
	Kind          string          `json:"kind"`
	SandboxID     string          `json:"sandbox_id"`
	Parent        string          `json:"parent"`
	Generation    uint64          `json:"generation"`
	CreatedAt     time.Time       `json:"created_at"`
	Memory        json.RawMessage `json:"memory"`
	Disk          json.RawMessage `json:"disk"`
	State         json.RawMessage `json:"state"`
	VMM           json.RawMessage `json:"vmm"`
	EnvdVersion   string          `json:"envd_version"`
	NetworkLayout string          `json:"network_layout"`
	Size          int64           `json:"size"`
}

func (b *bundle) records(dir string) error {
	return errors.Join(
		addViews[journalView](b, "journals", filepath.Join(dir, "sandboxes", "*", "journal.json")),
		addViews[manifestView](b, "manifests", filepath.Join(dir, "store", "snapshots", "*", "manifest.json")))
}

// addViews takes the known fields of JSON files, each named by its directory.
func addViews[T any](b *bundle, as, pattern string) error {
	paths, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	for i, path := range paths {
		if i == bundleFiles {
			b.miss(as, fmt.Errorf("there are %d; only %d are here", len(paths), bundleFiles))
			break
		}
		var v T
		text, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(text, &v)
		}
		if err != nil {
			b.miss(path, err)
			continue
		}
		if err := b.addJSON(as+"/"+filepath.Base(filepath.Dir(path))+".json", v); err != nil {
			return err
		}
	}
	return nil
}

// logs has the ends of our own processes' logs. A guest's console is the guest's
// affair.
func (b *bundle) logs(dir string) error {
	paths, _ := filepath.Glob(filepath.Join(dir, "sandboxes", "*", "qemu.log"))
	own := []string{filepath.Join(dir, "run", "pager.log")}
	if older := own[0] + ".1"; exists(older) {
		own = append(own, older)
	}
	for _, path := range append(own, paths[:min(len(paths), bundleFiles)]...) {
		text, err := tailOf(path, bundleLog)
		if err != nil {
			b.miss(path, err)
			continue
		}
		name := strings.ReplaceAll(strings.TrimPrefix(path, dir+"/"), "/", "-")
		if err := b.add("logs/"+name, text); err != nil {
			return err
		}
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// tailOf reads the last n bytes of a file.
func tailOf(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, st.Size()-n), n))
}

// files lists the state directory: names, sizes and room taken.
func (b *bundle) files(dir string) error {
	var list bytes.Buffer
	n := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			b.miss(path, err)
			return nil
		}
		if n++; n > bundleFiles {
			fmt.Fprintln(&list, "[and more]")
			return fs.SkipAll
		}
		if st, err := d.Info(); err == nil {
			fmt.Fprintf(&list, "%v %12d %s %s\n", st.Mode(), st.Size(), st.ModTime().UTC().Format(time.RFC3339), path)
		}
		return nil
	})
	if err != nil {
		b.miss(dir, err)
	}
	return b.add("files.txt", list.Bytes())
}

// server has what a running server tells without a key.
func (b *bundle) server(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for path, name := range map[string]string{"/healthz": "healthz.json", "/readyz": "readyz.json", "/metrics": "metrics.txt"} {
		text, err := fetch(ctx, url+path)
		if err != nil {
			b.miss(path, err)
			continue
		}
		if err := b.add(name, text); err != nil {
			return err
		}
	}
	return nil
}

func fetch(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, bundlePart+1))
}

// serverFlags finds the flags of the server on a state directory, by its
// command line. What a flag's value might hold of secrets is left out.
func serverFlags(dir string) []string {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		text, err := os.ReadFile(line)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(strings.TrimRight(string(text), "\x00"), "\x00")
		if len(args) < 2 || filepath.Base(args[0]) != "wrenn" || args[1] != "up" || !holdsLock(filepath.Dir(line), dir) {
			continue
		}
		return safeFlags(args[2:])
	}
	return nil
}

// holdsLock tells whether a process has the state directory's lock open.
func holdsLock(proc, dir string) bool {
	lock, err := os.Stat(filepath.Join(dir, "lock"))
	if err != nil {
		return false
	}
	fds, _ := filepath.Glob(filepath.Join(proc, "fd", "*"))
	for _, fd := range fds {
		if st, err := os.Stat(fd); err == nil && os.SameFile(st, lock) {
			return true
		}
	}
	return false
}

// safeFlags keeps the names of all flags and the values of those that say how,
// not with whom, the server works. A database's URL may hold a password.
func safeFlags(args []string) []string {
	known := map[string]bool{}
	for _, name := range []string{"dir", "listen", "driver", "on-exit", "memory-limit", "rate-limit", "max-requests",
		"network-pool", "network-prefix", "dns", "vmm-user", "log-json", "verbose"} {
		known[name] = true
	}
	var out []string
	for i := 0; i < len(args); i++ {
		name, value, has := strings.Cut(args[i], "=")
		if !has && i+1 < len(args) && !strings.HasPrefix(args[i+1], "-") {
			i++
			value, has = args[i], true
		}
		if has && !known[strings.TrimLeft(name, "-")] {
			value = "[removed]"
		}
		if has {
			name += "=" + value
		}
		out = append(out, name)
	}
	return out
}
