package guest

import (
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
)

// Bounds on what a caller may send. They are checked before anything is done
// with a value, and each refusal names the field.
const (
	// maxMessage bounds one Connect message, in bytes.
	maxMessage = 8 << 20
	// maxJSONBody bounds the body of /init, in bytes.
	maxJSONBody = 4 << 20
	// maxString is the kernel's bound on one argument or one KEY=value.
	maxString = 128<<10 - 1
	// maxArgBytes bounds all arguments and the whole environment together; the
	// kernel allows a quarter of the stack limit, 2 MiB by default.
	maxArgBytes = 1 << 20
	maxArgs     = 16384
	maxEnvs     = 4096
	// maxPath is the kernel's PATH_MAX with its final NUL.
	maxPath = 4095
	maxTag  = 256
	maxUser = 32
	// maxTermSide bounds a terminal's rows and columns.
	maxTermSide = 10000
)

func invalidf(format string, args ...any) *connect.Error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

// checkEnvs bounds one set of environment variables and returns its size.
func checkEnvs(field string, envs map[string]string) (int, error) {
	if len(envs) > maxEnvs {
		return 0, invalidf("%s: %d variables are more than %d", field, len(envs), maxEnvs)
	}
	size := 0
	for k, v := range envs {
		switch {
		case k == "" || strings.ContainsAny(k, "=\x00"):
			return 0, invalidf("%s: invalid variable name %q", field, clip(k))
		case strings.IndexByte(v, 0) >= 0:
			return 0, invalidf("%s: the value of %q holds a NUL byte", field, clip(k))
		case len(k)+len(v)+1 > maxString:
			return 0, invalidf("%s: %q is longer than %d bytes", field, clip(k), maxString)
		}
		size += len(k) + len(v) + 2
	}
	if size > maxArgBytes {
		return 0, invalidf("%s: %d bytes are more than %d", field, size, maxArgBytes)
	}
	return size, nil
}

// checkConfig bounds a command.
func checkConfig(c *pb.ProcessConfig) error {
	if c == nil {
		return invalidf("process: missing")
	}
	if c.GetCmd() == "" {
		return invalidf("process.cmd: empty")
	}
	if len(c.GetArgs()) > maxArgs {
		return invalidf("process.args: %d are more than %d", len(c.GetArgs()), maxArgs)
	}
	size, err := checkEnvs("process.envs", c.GetEnvs())
	if err != nil {
		return err
	}
	for i, a := range append([]string{c.GetCmd()}, c.GetArgs()...) {
		field := "process.cmd"
		if i > 0 {
			field = fmt.Sprintf("process.args[%d]", i-1)
		}
		if strings.IndexByte(a, 0) >= 0 {
			return invalidf("%s: holds a NUL byte", field)
		}
		if len(a) > maxString {
			return invalidf("%s: longer than %d bytes", field, maxString)
		}
		size += len(a) + 1
	}
	if size > maxArgBytes {
		return invalidf("process: arguments and environment of %d bytes are more than %d", size, maxArgBytes)
	}
	return nil
}

func checkPath(field, path string) error {
	switch {
	case strings.IndexByte(path, 0) >= 0:
		return invalidf("%s: holds a NUL byte", field)
	case len(path) > maxPath:
		return invalidf("%s: longer than %d bytes", field, maxPath)
	}
	return nil
}

func checkTag(tag string) error {
	if tag == "" || len(tag) > maxTag {
		return invalidf("tag: must have 1 to %d bytes", maxTag)
	}
	return nil
}

// termSize checks a terminal's size; an absent one is 80 columns by 24 rows.
func termSize(p *pb.PTY) (cols, rows uint16, err error) {
	c, r := p.GetSize().GetCols(), p.GetSize().GetRows()
	if p.GetSize() == nil {
		c, r = 80, 24
	}
	if c == 0 || r == 0 || c > maxTermSide || r > maxTermSide {
		return 0, 0, invalidf("pty.size: %d columns by %d rows: both must be 1 to %d", c, r, maxTermSide)
	}
	return uint16(c), uint16(r), nil
}

// clip keeps a hostile value out of messages and logs at full length.
func clip(s string) string {
	const limit = 128
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}

// codeOf is the Connect code of an error made by this package's checks.
func codeOf(err error) connect.Code {
	var ce *connect.Error
	if errors.As(err, &ce) {
		return ce.Code()
	}
	return connect.CodeInternal
}
