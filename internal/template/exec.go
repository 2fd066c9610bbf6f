package template

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// tailLines is how much of a failed tool's output an error carries.
const tailLines = 12

// toolPackages maps the tools a build needs to the Debian packages that have
// them. dpkg-deb and apt come with mmdebstrap's dependencies.
var toolPackages = []struct{ tool, pkg string }{
	{"mmdebstrap", "mmdebstrap"},
	{"mke2fs", "e2fsprogs"},
	{"debugfs", "e2fsprogs"},
	{"e2fsck", "e2fsprogs"},
}

// findTool looks in PATH, then where Debian puts administrators' tools, which
// are not in everybody's PATH.
func findTool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		p := filepath.Join(dir, name)
		if _, err := exec.LookPath(p); err == nil {
			return p, nil
		}
	}
	for _, t := range toolPackages {
		if t.tool == name {
			return "", fmt.Errorf("%s is not installed: apt-get install %s", name, t.pkg)
		}
	}
	return "", fmt.Errorf("%s is not installed", name)
}

// toolError is a tool's failure with the end of what it said.
type toolError struct {
	tool string
	tail string
	err  error
}

func (e *toolError) Error() string {
	if e.tail == "" {
		return fmt.Sprintf("%s: %v", e.tool, e.err)
	}
	return fmt.Sprintf("%s: %v; its last lines:\n%s", e.tool, e.err, e.tail)
}

func (e *toolError) Unwrap() error { return e.err }

// command is one run of a tool.
type command struct {
	path  string
	args  []string
	dir   string
	env   []string // added to a minimal environment
	stdin io.Reader
	// contained runs the tool in mount and PID namespaces of its own where the
	// kernel allows it: its mounts and every descendant end with it.
	contained bool
	// hold is inherited and kept open by every descendant. A build's lock goes
	// here, so that nobody starts over while orphans still write.
	hold *os.File
	line func(string) // sees each line of output
}

// run runs c to its end. If ctx ends first, or this process is killed, the tool
// is killed with SIGKILL; nothing it leaves behind is ever trusted.
func (c command) run(ctx context.Context) (output string, err error) {
	// Pdeathsig acts when the starting thread ends, not the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	out, err := c.once(ctx, c.contained)
	if c.contained && errors.Is(err, syscall.EPERM) && !isExit(err) {
		// A container without the right to make namespaces. mmdebstrap cannot
		// mount there either, so there is nothing to undo.
		out, err = c.once(ctx, false)
	}
	if err == nil {
		return out.text(), nil
	}
	if ctx.Err() != nil {
		return "", fmt.Errorf("%s: %w", filepath.Base(c.path), context.Cause(ctx))
	}
	return "", &toolError{tool: filepath.Base(c.path), tail: out.tail(tailLines), err: err}
}

func isExit(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit)
}

func (c command) once(ctx context.Context, contained bool) (*lineBuffer, error) {
	out := &lineBuffer{line: c.line}
	cmd := exec.CommandContext(ctx, c.path, c.args...)
	cmd.Dir = c.dir
	cmd.Env = append(minimalEnv(), c.env...)
	cmd.Stdin = c.stdin
	cmd.Stdout, cmd.Stderr = out, out
	if c.hold != nil {
		cmd.ExtraFiles = []*os.File{c.hold}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if contained {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	err := cmd.Run()
	out.flush()
	return out, err
}

// minimalEnv keeps a build independent of who runs it; only proxies pass.
func minimalEnv() []string {
	env := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"LC_ALL=C.UTF-8", "HOME=/root", "DEBIAN_FRONTEND=noninteractive",
	}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// maxOutput bounds what is kept of a tool's output, in bytes.
const maxOutput = 1 << 20

// lineBuffer keeps a tool's output and calls line for each line of it.
type lineBuffer struct {
	line    func(string)
	all     bytes.Buffer
	partial []byte
}

func (b *lineBuffer) Write(p []byte) (int, error) {
	if b.all.Len()+len(p) > maxOutput {
		keep := b.all.Bytes()[b.all.Len()/2:]
		b.all = *bytes.NewBuffer(bytes.Clone(keep))
	}
	b.all.Write(p)
	if b.line == nil {
		return len(p), nil
	}
	b.partial = append(b.partial, p...)
	for {
		i := bytes.IndexByte(b.partial, '\n')
		if i < 0 {
			return len(p), nil
		}
		b.line(string(b.partial[:i]))
		b.partial = b.partial[i+1:]
	}
}

func (b *lineBuffer) flush() {
	if b.line != nil && len(b.partial) > 0 {
		b.line(string(b.partial))
		b.partial = nil
	}
}

func (b *lineBuffer) text() string { return b.all.String() }

func (b *lineBuffer) tail(n int) string {
	lines := strings.Split(strings.TrimSpace(b.all.String()), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
