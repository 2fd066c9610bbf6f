package template

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
)

// builderVersion changes when the code of this package makes something else of
// the same inputs.
const builderVersion = 1

// DefaultSourceDateEpoch is the day Debian 12 was released.
const DefaultSourceDateEpoch = 1686355200

const (
	suite         = "bookworm"
	architecture  = "amd64"
	kernelPackage = "linux-image-cloud-amd64"
)

//go:embed customize.sh
var customizeScript string

// packages is what the base template holds beyond Debian's essential set: what
// the published SDKs expect of `base`, and the few tools without which people
// think a machine broken. Recommended packages are not installed.
var packages = []string{
	"attr",
	"bash",
	"ca-certificates",
	"curl",
	"git",
	"iproute2",
	"kmod",
	"less",
	"ncurses-base",
	"ncurses-bin",
	"ncurses-term",
	"netbase",
	"procps",
	"python-is-python3",
	"python3",
	"python3-pip",
	"python3-venv",
	"sudo",
	"tzdata",
	"unzip",
	"xz-utils",
}

// dpkgOptions keep out of the image, and of what is installed later, what
// nobody reads in a sandbox.
var dpkgOptions = []string{
	"path-exclude=/usr/share/doc/*",
	"path-include=/usr/share/doc/*/copyright",
	"path-exclude=/usr/share/info/*",
	"path-exclude=/usr/share/man/*",
	"path-exclude=/usr/share/locale/*",
	"path-exclude=/usr/share/lintian/*",
}

// packagesInputs is everything the packages stage depends on, but for what the
// mirror offers at the time.
type packagesInputs struct {
	Builder   int
	Suite     string
	Arch      string
	Kernel    string
	Packages  []string
	Dpkg      []string
	Script    string
	Mkfs      []string
	Modules   string
	Sources   string // only when the caller chose them: a mirror is no content
	Epoch     int64
	DiskBytes int64
}

func (o Options) packagesKey() (string, error) {
	return digestOf(packagesInputs{
		Builder: builderVersion, Suite: suite, Arch: architecture, Kernel: kernelPackage,
		Packages: packages, Dpkg: dpkgOptions, Script: customizeScript, Mkfs: mkfsOptions,
		Modules: fmt.Sprint(bootModules), Sources: o.Sources,
		Epoch: o.SourceDateEpoch, DiskBytes: o.DiskSizeBytes,
	})
}

// templateInputs is everything the finished template depends on. Resolved
// stands for the package versions that the packages stage got, so that a
// refreshed one makes another template.
type templateInputs struct {
	Builder  int
	Packages string
	Resolved string
	Envd     string
}

// digestOf is the SHA-256 of v's JSON, 64 hex digits.
func digestOf(v any) (string, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("encoding the inputs: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}
