package firecracker

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
)

// version of Firecracker. Fields of its API came and went with it.
type version struct{ major, minor, patch int }

func (v version) String() string { return fmt.Sprintf("%d.%d.%d", v.major, v.minor, v.patch) }

func (v version) atLeast(major, minor int) bool {
	return v.major > major || v.major == major && v.minor >= minor
}

// supported is what the driver speaks: 1.10 is the first whose page-fault
// hand-over and state files are as they are now; 2 may change anything. Tests
// run on 1.12.1.
const supported = "1.10 to 1.x"

func (v version) check() error {
	if v.major != 1 || v.minor < 10 {
		return fmt.Errorf("firecracker %s is not supported: %s is", v, supported)
	}
	return nil
}

// dirtyField is the name that a load gives to the tracking of changed pages.
func (v version) dirtyField() string {
	if v.atLeast(1, 13) {
		return "track_dirty_pages"
	}
	return "enable_diff_snapshots"
}

var (
	versionLine = regexp.MustCompile(`(?m)^(?:Firecracker|Jailer) v([0-9]{1,5})\.([0-9]{1,5})\.([0-9]{1,5})`)
	numbers     = regexp.MustCompile(`^v?([0-9]{1,5})\.([0-9]{1,5})\.([0-9]{1,5})`)
	stateLine   = regexp.MustCompile(`(?m)^v([0-9]+\.[0-9]+\.[0-9]+)\s*$`)
)

func parseVersion(m [][]byte) (v version, err error) {
	if m == nil {
		return v, fmt.Errorf("it says no version")
	}
	v.major, _ = strconv.Atoi(string(m[1]))
	v.minor, _ = strconv.Atoi(string(m[2]))
	v.patch, _ = strconv.Atoi(string(m[3]))
	return v, nil
}

// find resolves a program and asks its version.
func find(ctx context.Context, name string) (path string, v version, err error) {
	path, err = exec.LookPath(name)
	if err != nil {
		return "", v, fmt.Errorf("%s is not installed: %w", name, err)
	}
	out, err := ask(ctx, path, "--version")
	if err == nil {
		v, err = parseVersion(versionLine.FindSubmatch(out))
	}
	if err != nil {
		return "", v, fmt.Errorf("asking the version of %s: %w", path, err)
	}
	return path, v, nil
}

// stateVersion asks for the version of the state files it reads and writes.
func stateVersion(ctx context.Context, path string) (string, error) {
	out, err := ask(ctx, path, "--snapshot-version")
	if err != nil {
		return "", fmt.Errorf("asking %s for its state version: %w", path, err)
	}
	m := stateLine.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("asking %s for its state version: it says %q", path, clip(out))
	}
	return string(m[1]), nil
}

func ask(ctx context.Context, path, question string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path, question)
	var stderr bytes.Buffer
	cmd.Stderr, cmd.Env = &stderr, environment()
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, clip(stderr.Bytes()))
	}
	return out, nil
}

func clip(b []byte) []byte { return bytes.TrimSpace(b[:min(len(b), 300)]) }

func environment() []string { return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"} }
