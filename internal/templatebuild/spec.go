package templatebuild

import (
	"regexp"
	"slices"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/oci"
)

// Spec is what to build, as the SDKs send it.
type Spec struct {
	FromImage         string        `json:"fromImage"`
	FromTemplate      string        `json:"fromTemplate"`
	FromImageRegistry ImageRegistry `json:"fromImageRegistry"`
	Force             bool          `json:"force"`
	Steps             []Step        `json:"steps"`
	StartCmd          string        `json:"startCmd"`
	ReadyCmd          string        `json:"readyCmd"`
}

// ImageRegistry are credentials for the image's registry, in one of three forms.
type ImageRegistry struct {
	Type string `json:"type"` // registry, gcp or aws
	// Of registry.
	Username string `json:"username"`
	Password string `json:"password"`
	// Of gcp.
	ServiceAccountJSON string `json:"serviceAccountJson"`
}

// Step is one instruction: RUN [command, user], COPY [source, destination,
// owner, mode], ENV [name, value, …], WORKDIR [directory], USER [name].
type Step struct {
	Type      string   `json:"type"`
	Args      []string `json:"args"`
	FilesHash string   `json:"filesHash"`
	Force     bool     `json:"force"`
}

const (
	maxSteps = 500
	maxArg   = 100 << 10
	// maxName leaves room for the build in the snapshot's name.
	maxName = 48
	maxTags = 32
)

var (
	nameRE  = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]*$`)
	tagRE   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	hashRE  = regexp.MustCompile(`^[0-9a-f]{64}$`)
	ownerRE = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}(:[a-z_][a-z0-9_-]{0,31})?$`)
	userRE  = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	modeRE  = regexp.MustCompile(`^[0-7]{3,5}$`)
	envRE   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,255}$`)
)

// SplitName takes a name apart into name and tag.
func SplitName(s string) (name, tag string) {
	name, tag, ok := strings.Cut(s, ":")
	if !ok {
		tag = DefaultTag
	}
	return name, tag
}

func checkName(field, name string) error {
	if !nameRE.MatchString(name) || len(name) > maxName {
		return control.Invalid(field, "%.80q must be 1 to %d of a-z, 0-9, dot, underscore and hyphen, and begin with a letter or digit", name, maxName)
	}
	return nil
}

func checkTags(tags []string) error {
	if len(tags) > maxTags {
		return control.Invalid("tags", "must be at most %d; there are %d", maxTags, len(tags))
	}
	for _, t := range tags {
		if !tagRE.MatchString(t) {
			return control.Invalid("tags", "%.80q must be 1 to 63 letters, digits, dots, underscores and hyphens, and begin with a letter or digit", t)
		}
	}
	return nil
}

func (s Spec) check() error {
	if len(s.Steps) > maxSteps {
		return control.Invalid("steps", "must be at most %d; there are %d", maxSteps, len(s.Steps))
	}
	for _, c := range []struct{ field, cmd string }{{"startCmd", s.StartCmd}, {"readyCmd", s.ReadyCmd}} {
		if len(c.cmd) > maxArg || strings.ContainsRune(c.cmd, 0) {
			return control.Invalid(c.field, "must be at most %d bytes without NUL", maxArg)
		}
	}
	if s.FromTemplate != "" {
		name, tag := SplitName(s.FromTemplate)
		if control.ValidateName("", name) != nil || !tagRE.MatchString(tag) {
			return control.Invalid("fromTemplate", "%.80q is no name of a template", s.FromTemplate)
		}
	}
	for i, st := range s.Steps {
		if err := st.check(); err != nil {
			return control.Invalid("steps", "number %d: %v", i+1, err.Message)
		}
	}
	_, err := s.source()
	return err
}

func (s Step) check() *control.Error {
	for _, a := range s.Args {
		if len(a) > maxArg || strings.ContainsRune(a, 0) {
			return control.Invalid(s.Type, "an argument must be at most %d bytes without NUL", maxArg)
		}
	}
	arg := func(i int) string {
		if i < len(s.Args) {
			return s.Args[i]
		}
		return ""
	}
	switch s.Type {
	case "RUN":
		if strings.TrimSpace(arg(0)) == "" || len(s.Args) > 2 {
			return control.Invalid("RUN", "wants a command, and a user if need be")
		}
		if u := arg(1); u != "" && !userRE.MatchString(u) {
			return control.Invalid("RUN", "%.40q is no user's name", u)
		}
	case "USER":
		if len(s.Args) != 1 || !userRE.MatchString(arg(0)) {
			return control.Invalid("USER", "wants one user's name; got %.80q", s.Args)
		}
	case "WORKDIR":
		if len(s.Args) != 1 || arg(0) == "" {
			return control.Invalid("WORKDIR", "wants one directory")
		}
	case "ENV":
		if len(s.Args) == 0 || len(s.Args)%2 != 0 {
			return control.Invalid("ENV", "wants pairs of name and value; got %d words", len(s.Args))
		}
		for i := 0; i < len(s.Args); i += 2 {
			if !envRE.MatchString(s.Args[i]) {
				return control.Invalid("ENV", "%.80q is no name of a variable", s.Args[i])
			}
		}
	case "COPY":
		switch src := arg(0); {
		case len(s.Args) < 2 || len(s.Args) > 4 || src == "" || arg(1) == "":
			return control.Invalid("COPY", "wants source and destination, and owner and mode if need be")
		case strings.HasPrefix(src, "/") || slices.Contains(strings.Split(src, "/"), ".."):
			return control.Invalid("COPY", "the source %.80q must lie in the build's context", src)
		case arg(2) != "" && !ownerRE.MatchString(arg(2)):
			return control.Invalid("COPY", "the owner %.80q must be user or user:group", arg(2))
		case arg(3) != "" && !modeRE.MatchString(arg(3)):
			return control.Invalid("COPY", "the mode %.20q must be octal", arg(3))
		case !hashRE.MatchString(s.FilesHash):
			return control.Invalid("COPY", "filesHash must be 64 hex digits")
		}
	default:
		return control.Invalid("type", "%.40q is not known; there are RUN, COPY, ENV, WORKDIR and USER", s.Type)
	}
	return nil
}

// source is what a build starts from: a template, or an image.
type source struct {
	template    string
	image       *oci.Reference
	credentials oci.Credentials
}

// ownBase is the image that the SDKs name for E2B's own base, which is not
// pulled: base is ours.
const ownBase = "docker.io/e2bdev/base:latest"

func (s Spec) source() (source, error) {
	c, err := s.FromImageRegistry.credentials()
	if err != nil {
		return source{}, err
	}
	switch {
	case s.FromTemplate != "" && s.FromImage != "":
		return source{}, control.Invalid("fromImage", "and fromTemplate exclude each other")
	case s.FromTemplate != "":
		return source{template: s.FromTemplate}, nil
	case s.FromImage == "":
		return source{template: control.DefaultTemplate}, nil
	}
	ref, err := oci.ParseReference(s.FromImage)
	if err != nil {
		return source{}, control.Invalid("fromImage", "%v", err)
	}
	if ref.String() == ownBase {
		return source{template: control.DefaultTemplate}, nil
	}
	return source{image: &ref, credentials: c}, nil
}

const maxSecret = 64 << 10

func (r ImageRegistry) credentials() (c oci.Credentials, err error) {
	switch r.Type {
	case "":
		if r != (ImageRegistry{}) {
			return c, control.Invalid("fromImageRegistry", "type is missing; there are registry and gcp")
		}
		return c, nil
	case "registry":
		c = oci.Credentials{Username: r.Username, Password: r.Password}
	case "gcp":
		// Google's registries take a service account's key as a password.
		c = oci.Credentials{Username: "_json_key", Password: r.ServiceAccountJSON}
	case "aws":
		return c, control.Invalid("fromImageRegistry", "type aws is not done here: give the username AWS and, as password, what `aws ecr get-login-password` prints")
	default:
		return c, control.Invalid("fromImageRegistry", "type %.40q is not known; there are registry and gcp", r.Type)
	}
	if c.Username == "" || c.Password == "" {
		return c, control.Invalid("fromImageRegistry", "type %s wants both a user and a secret", r.Type)
	}
	if len(c.Username)+len(c.Password) > maxSecret {
		return c, control.Invalid("fromImageRegistry", "must have at most %d bytes", maxSecret)
	}
	return c, nil
}
