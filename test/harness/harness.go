// Package harness runs a real `wrenn up` for the demo, the end-to-end tests
// and the benchmarks, and looks at the host the way its owner would.
package harness

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/client"
)

// Options say how to run the server.
type Options struct {
	// Dir is the state directory.
	Dir string
	// Args are added to `wrenn up`.
	Args []string
	// Wrap is a command that runs the server's, which follows it; it must become
	// that process. Env is added to the environment.
	Wrap, Env []string
	// Output takes the server's progress and log.
	Output io.Writer
}

// Server is a running `wrenn up`.
type Server struct {
	*client.Client
	URL string
	Dir string

	opts Options
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Bin returns the directory of the programs under test.
func Bin() string {
	if d := os.Getenv("WRENN_BIN"); d != "" {
		return d
	}
	return "bin"
}

// DevDir is where state for development lives.
func DevDir() string {
	if d := os.Getenv("WRENN_DEV_DIR"); d != "" {
		return d
	}
	return "/var/tmp/wrenn-dev"
}

// Driver is what runs the VMs of servers under test: WRENN_TEST_DRIVER, or
// nothing for the server's own choice.
func Driver() string { return os.Getenv("WRENN_TEST_DRIVER") }

var serves = regexp.MustCompile(`serves on (http://\S+)`)

// Start runs the server and returns when it takes requests.
func Start(ctx context.Context, o Options) (*Server, error) {
	if o.Output == nil {
		o.Output = os.Stderr
	} else if os.Getenv("WRENN_TEST_VERBOSE") == "1" {
		o.Output = io.MultiWriter(o.Output, os.Stderr)
		o.Args = append(o.Args, "--verbose")
	}
	s := &Server{Dir: o.Dir, opts: o}
	return s, s.Restart(ctx)
}

// Restart starts the server again after it ended, on the same state.
func (s *Server) Restart(ctx context.Context) error {
	args := []string{"up", "--dir", s.Dir, "--listen", "127.0.0.1:0"}
	if d := Driver(); d != "" {
		args = append(args, "--driver", d)
	}
	args = append(args, s.opts.Args...)
	program, err := filepath.Abs(filepath.Join(Bin(), "wrenn"))
	if err != nil {
		return err
	}
	line := slices.Concat(s.opts.Wrap, []string{program}, args)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = append(os.Environ(), s.opts.Env...)
	cmd.Stderr = s.opts.Output
	// What a developer presses Ctrl-C on is us; we end the server.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start wrenn up: %w", err)
	}
	url := make(chan string, 1)
	done := make(chan struct{})
	s.cmd, s.done = cmd, done
	go func() {
		defer close(done)
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			if m := serves.FindStringSubmatch(lines.Text()); m != nil {
				url <- m[1]
			}
		}
		s.err = cmd.Wait()
	}()
	select {
	case s.URL = <-url:
	case <-done:
		return fmt.Errorf("wrenn up ended: %v", s.err)
	case <-ctx.Done():
		s.Kill()
		return fmt.Errorf("wrenn up does not come up: %w", ctx.Err())
	}
	key, err := os.ReadFile(filepath.Join(s.Dir, "api-key"))
	if err != nil {
		return fmt.Errorf("read the API key: %w", err)
	}
	s.Client, err = client.New(client.Options{BaseURL: s.URL, APIKey: strings.TrimSpace(string(key))})
	return err
}

// SetArgs changes what is added to `wrenn up` from the next start on.
func (s *Server) SetArgs(args ...string) { s.opts.Args = args }

// PID returns the server's process.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Kill ends the server as a crash would.
func (s *Server) Kill() {
	s.cmd.Process.Kill()
	<-s.done
}

// Ended is closed when the server's process has ended.
func (s *Server) Ended() <-chan struct{} { return s.done }

// Stop ends the server as its owner would and returns its verdict.
func (s *Server) Stop() error {
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-s.done
	return s.err
}

// Wipe ends everything that a server left on the host: for the end of a test
// that went wrong. It goes by the state directory in the command lines.
func (s *Server) Wipe() {
	for _, p := range ProcessesOf(s.Dir) {
		p.Kill()
	}
}

// Process is a process of the host.
type Process struct {
	PID     int
	Cmdline string
}

// Kill ends the process if it is still the one that was seen.
func (p Process) Kill() {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if now, _ := cmdline(p.PID); now == p.Cmdline {
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000)
	}
}

// Memory returns the bytes of RAM that the process holds, guest memory
// included.
func (p Process) Memory() int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
			return kb << 10
		}
	}
	return 0
}

// ProcessesOf lists the processes whose command line names a path, or which
// are jailed below it: with a state directory all of its processes, with a
// sandbox's directory its VM.
func ProcessesOf(path string) []Process {
	entries, _ := os.ReadDir("/proc")
	var out []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		c, err := cmdline(pid)
		program := filepath.Base(strings.Split(c, "\x00")[0])
		if err != nil {
			continue
		}
		switch {
		case program == "firecracker":
			if strings.Contains(c, path) || strings.Contains(rootOf(pid), path) {
				out = append(out, Process{pid, c})
			}
		case program == "wrenn", program == "jailer", strings.HasPrefix(program, "qemu-system"):
			if strings.Contains(c, path) {
				out = append(out, Process{pid, c})
			}
		}
	}
	return out
}

// rootOf is the directory, within its file system, that is a process's root. A
// jailed VM is known by it, also when the jail has been removed.
func rootOf(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == "/" {
			return f[3]
		}
	}
	return ""
}

func cmdline(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return string(b), err
}

// VM returns the process of a sandbox, or nil.
func (s *Server) VM(id string) *Process {
	ps := ProcessesOf(filepath.Join(s.Dir, "sandboxes", id) + "/")
	if len(ps) == 0 {
		return nil
	}
	return &ps[0]
}

// Pager returns the pager's process, or nil.
func (s *Server) Pager() *Process {
	for _, p := range ProcessesOf(s.Dir) {
		if args := strings.Split(p.Cmdline, "\x00"); len(args) > 1 && args[1] == "pager" {
			return &p
		}
	}
	return nil
}

// Eventually asks until the answer is yes or the limit is over: for facts
// about other processes, which send us no event.
func Eventually(limit time.Duration, ask func() bool) bool {
	deadline := time.Now().Add(limit)
	for {
		if ask() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// DiskUsage returns the bytes that a directory's files take on the disk.
func DiskUsage(dir string) int64 {
	var total int64
	filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && !d.IsDir() && unix.Lstat(path, &st) == nil {
			total += st.Blocks * 512
		}
		return nil
	})
	return total
}

// FreeMemory returns the bytes of RAM that the host has available.
func FreeMemory() int64 {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if v, ok := strings.CutPrefix(lines.Text(), "MemAvailable:"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
			return kb << 10
		}
	}
	return 0
}

// Sh runs a shell line in a sandbox and returns its output; anything but exit
// code 0 is an error.
func (s *Server) Sh(ctx context.Context, id, line string) (string, error) {
	r, err := s.Exec(ctx, id, client.ExecRequest{Cmd: "/bin/bash", Args: []string{"-c", line}, TimeoutSec: 120})
	if err != nil {
		return "", fmt.Errorf("sandbox %s: %q: %w", id, line, err)
	}
	if r.ExitCode != 0 || r.TimedOut {
		return "", fmt.Errorf("sandbox %s: %q: exit code %d: %s%s", id, line, r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout)), nil
}
