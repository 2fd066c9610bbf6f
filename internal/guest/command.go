package guest

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
)

// defaultPath is what Debian gives to root, with nothing missing that a user
// with sudo may want.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// command is a checked request to run a program: everything the caller said
// has been resolved for its user.
type command struct {
	config *pb.ProcessConfig
	user   account
	path   string
	dir    string
	env    []string
}

// newCommand resolves a configuration for a user of the guest; tty tells that
// it will have a terminal.
func (s *Server) newCommand(c *pb.ProcessConfig, u account, tty bool) (*command, error) {
	if err := checkConfig(c); err != nil {
		return nil, err
	}
	id := s.identity()
	def := s.defaults()
	dir, err := workingDir(c, cmp.Or(def.Workdir, id.DefaultWorkdir), u)
	if err != nil {
		return nil, err
	}
	env := map[string]string{
		"HOME": u.home, "USER": u.name, "LOGNAME": u.name, "SHELL": u.shell,
		"PATH": defaultPath, "PWD": dir,
	}
	if tty {
		env["TERM"] = "xterm-256color"
	}
	maps.Copy(env, s.trustEnvs())
	maps.Copy(env, def.Envs)
	maps.Copy(env, id.Envs)
	maps.Copy(env, c.GetEnvs())
	path, err := findProgram(c.GetCmd(), env["PATH"], dir)
	if err != nil {
		return nil, err
	}
	cmd := &command{config: c, user: u, path: path, dir: dir}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		cmd.env = append(cmd.env, k+"="+env[k])
	}
	return cmd, nil
}

// workingDir is the directory that the caller names, else the sandbox's
// default, else the user's home, else the root.
func workingDir(c *pb.ProcessConfig, workdir string, u account) (string, error) {
	named := c.GetCwd()
	def := workdir
	if def == "" {
		def = u.home
	}
	dir, err := resolvePath("process.cwd", named, def, u)
	if err != nil {
		return "", err
	}
	fi, err := os.Stat(dir)
	switch {
	case err == nil && fi.IsDir():
		return dir, nil
	case named == "" && workdir == "":
		// Accounts without a home are usual for services.
		return "/", nil
	case err == nil:
		return "", invalidf("process.cwd: '%s' is not a directory", clip(dir))
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return "", invalidf("process.cwd: '%s' does not exist", clip(dir))
	default:
		return "", invalidf("process.cwd: %v", err)
	}
}

// findProgram is what a shell does with the first word of a line, without
// built-ins: names with a slash are paths, others are searched for.
func findProgram(name, path, dir string) (string, error) {
	if strings.Contains(name, "/") {
		file := name
		if !filepath.IsAbs(file) {
			file = filepath.Join(dir, file)
		}
		return file, checkProgram(name, file)
	}
	var denied error
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d) // the empty element is the working directory
		}
		file := filepath.Join(d, name)
		err := checkProgram(name, file)
		if err == nil {
			return file, nil
		}
		if codeOf(err) == connect.CodePermissionDenied {
			denied = err
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", invalidf("process.cmd: '%s' not found in PATH %q", clip(name), clip(path))
}

func checkProgram(name, file string) error {
	fi, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return invalidf("process.cmd: '%s' does not exist", clip(name))
	case err != nil:
		return invalidf("process.cmd: '%s': %v", clip(name), errors.Unwrap(err))
	case fi.IsDir():
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("process.cmd: '%s' is a directory", clip(name)))
	case fi.Mode()&0o111 == 0:
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("process.cmd: '%s' is not executable", clip(name)))
	}
	return nil
}

// build makes the command to run: its own session, so that a signal reaches
// its group, and the user's credentials.
func (c *command) build() *exec.Cmd {
	attr := &syscall.SysProcAttr{Setsid: true}
	// Without root only one's own processes can be had: development only.
	if os.Geteuid() == 0 {
		attr.Credential = &syscall.Credential{Uid: c.user.uid, Gid: c.user.gid, Groups: c.user.groups}
	}
	return &exec.Cmd{
		Path:        c.path,
		Args:        append([]string{c.config.GetCmd()}, c.config.GetArgs()...),
		Env:         c.env,
		Dir:         c.dir,
		SysProcAttr: attr,
	}
}

// startError says which of the caller's values a failed start is about.
func (c *command) startError(err error) error {
	name := clip(c.config.GetCmd())
	code := connect.CodeInternal
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOEXEC), errors.Is(err, syscall.E2BIG),
		errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP):
		code = connect.CodeInvalidArgument
	case errors.Is(err, fs.ErrPermission):
		code = connect.CodePermissionDenied
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		code = connect.CodeResourceExhausted
	}
	return connect.NewError(code, fmt.Errorf("starting '%s': %w", name, err))
}
