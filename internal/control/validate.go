package control

import (
	"regexp"
	"strings"
	"unicode/utf8"
)

// Bounds of what callers may give.
const (
	MinVCPUs, MaxVCPUs       = 1, 32
	MinMemoryMB, MaxMemoryMB = 128, 65536
	DefaultVCPUs             = 1
	DefaultMemoryMB          = 512
	MaxTimeoutSec            = 30 * 24 * 3600
	MaxExecSec               = 24 * 3600
	MaxMetadata              = 64
	MaxMetadataKey           = 256
	MaxMetadataValue         = 4096
	MaxEnvs                  = 256
	MaxEnvKey                = 256
	MaxEnvValue              = 32 << 10
	MaxArgs                  = 4096
	MaxPath                  = 4096
	MaxListDepth             = 32
	MaxForks                 = 64
	MaxPageSize              = 1000
	DefaultPageSize          = 100
	MaxPtyCols, MaxPtyRows   = 65535, 65535
	DefaultTemplate          = "base"
)

var (
	idRE   = regexp.MustCompile(`^[a-z0-9]{1,32}$`)
	nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	tagRE  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	userRE = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	envRE  = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*$`)
)

// ValidateID checks the form of a sandbox ID.
func ValidateID(field, id string) error {
	if !idRE.MatchString(id) {
		return Invalid(field, "must be 1 to 32 of a-z and 0-9, as given when the sandbox was created")
	}
	return nil
}

// ValidateName checks the form of a snapshot's or template's name.
func ValidateName(field, name string) error {
	if !nameRE.MatchString(name) {
		return Invalid(field, "must begin with a-z or 0-9 and go on with up to 62 of a-z, 0-9, dot, underscore and hyphen")
	}
	return nil
}

func inRange(field string, v, low, high int64, unit string) error {
	if v < low || v > high {
		return Invalid(field, "must be from %d to %d%s; got %d", low, high, unit, v)
	}
	return nil
}

// clean checks a text that goes to a guest or a database.
func clean(field, s string, limit int) error {
	switch {
	case len(s) > limit:
		return Invalid(field, "must be at most %d bytes; has %d", limit, len(s))
	case strings.IndexByte(s, 0) >= 0:
		return Invalid(field, "must not contain a NUL byte")
	case !utf8.ValidString(s):
		return Invalid(field, "must be UTF-8")
	}
	return nil
}

// ValidateMetadata checks the pairs of a sandbox or of a filter.
func ValidateMetadata(m map[string]string) error {
	if len(m) > MaxMetadata {
		return Invalid("metadata", "must have at most %d entries; has %d", MaxMetadata, len(m))
	}
	for k, v := range m {
		if k == "" {
			return Invalid("metadata", "a key must not be empty")
		}
		if err := clean("metadata", k, MaxMetadataKey); err != nil {
			return err
		}
		if err := clean("metadata", v, MaxMetadataValue); err != nil {
			return err
		}
	}
	return nil
}

func validateEnvs(m map[string]string) error {
	if len(m) > MaxEnvs {
		return Invalid("envs", "must have at most %d entries; has %d", MaxEnvs, len(m))
	}
	for k, v := range m {
		if len(k) > MaxEnvKey || !envRE.MatchString(k) {
			return Invalid("envs", "%.64q is no name of a variable: a letter or underscore, then letters, digits, underscores, dots and hyphens, at most %d bytes", k, MaxEnvKey)
		}
		if err := clean("envs", v, MaxEnvValue); err != nil {
			return err
		}
	}
	return nil
}

func validateTimeout(sec int64) error {
	return inRange("timeout_sec", sec, 0, MaxTimeoutSec, " seconds (0 is no limit)")
}

func (p *CreateParams) validate() error {
	if p.Template == "" {
		p.Template = DefaultTemplate
	}
	name, tag, tagged := strings.Cut(p.Template, ":")
	if err := ValidateName("template", name); err != nil {
		return err
	}
	if tagged && !tagRE.MatchString(tag) {
		return Invalid("template", "the tag after the colon must be 1 to 63 letters, digits, dots, underscores and hyphens")
	}
	if p.VCPUs != nil {
		if err := inRange("vcpus", *p.VCPUs, MinVCPUs, MaxVCPUs, ""); err != nil {
			return err
		}
	}
	if p.MemoryMB != nil {
		if err := inRange("memory_mb", *p.MemoryMB, MinMemoryMB, MaxMemoryMB, " MiB"); err != nil {
			return err
		}
	}
	if err := validateTimeout(p.TimeoutSec); err != nil {
		return err
	}
	if err := ValidateMetadata(p.Metadata); err != nil {
		return err
	}
	if p.ID != "" {
		if err := ValidateID("id", p.ID); err != nil {
			return err
		}
	}
	if err := validateHTTPSPorts(p.Options.HTTPSPorts); err != nil {
		return err
	}
	if err := p.Options.Egress.validate(); err != nil {
		return err
	}
	return validateEnvs(p.Envs)
}

func validateUser(user string) error {
	if user != "" && !userRE.MatchString(user) {
		return Invalid("user", "must be a user's name of at most 32 characters: a-z or underscore, then a-z, 0-9, underscore and hyphen")
	}
	return nil
}

func (r *ExecRequest) validate() error {
	if r.AttachPID != 0 {
		if r.Cmd != "" || len(r.Args) > 0 || len(r.Envs) > 0 || r.Cwd != "" || r.User != "" || len(r.Stdin) > 0 || r.Pty != nil {
			return Invalid("pid", "a process that runs is only picked up; leave out everything but the pid")
		}
		return inRange("timeout_sec", r.TimeoutSec, 0, MaxExecSec, " seconds (0 is the greatest)")
	}
	if r.Cmd == "" {
		return Invalid("cmd", "must name the program to run")
	}
	if err := clean("cmd", r.Cmd, MaxPath); err != nil {
		return err
	}
	if len(r.Args) > MaxArgs {
		return Invalid("args", "must have at most %d entries; has %d", MaxArgs, len(r.Args))
	}
	for _, a := range r.Args {
		// Linux takes at most 128 KiB in one argument.
		if err := clean("args", a, 128<<10-1); err != nil {
			return err
		}
	}
	if err := validateEnvs(r.Envs); err != nil {
		return err
	}
	if err := clean("cwd", r.Cwd, MaxPath); err != nil {
		return err
	}
	if err := validateUser(r.User); err != nil {
		return err
	}
	if r.Pty != nil {
		if err := r.Pty.Validate(); err != nil {
			return err
		}
	}
	return inRange("timeout_sec", r.TimeoutSec, 0, MaxExecSec, " seconds (0 is the greatest)")
}

// Validate checks the size of a terminal.
func (p PtySize) Validate() error {
	if err := inRange("cols", int64(p.Cols), 1, MaxPtyCols, ""); err != nil {
		return err
	}
	return inRange("rows", int64(p.Rows), 1, MaxPtyRows, "")
}

func (f FileRef) validate() error {
	if f.Path == "" {
		return Invalid("path", "must name a file or directory, absolute or from the user's home")
	}
	if err := clean("path", f.Path, MaxPath); err != nil {
		return err
	}
	return validateUser(f.User)
}
