package template

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// packagesSpace is what the packages stage needs while it works, in bytes:
// archives, the root file system, the kernel's tree and the image.
const packagesSpace = 3 << 29

// packagesStage returns the directory of the packages stage and its
// description, building it if the cache does not have it. The caller holds lock,
// the lock of the cache.
func (b *builder) packagesStage(ctx context.Context, lock *os.File) (string, meta, error) {
	key, err := b.o.packagesKey()
	if err != nil {
		return "", meta{}, err
	}
	dst := filepath.Join(b.o.Cache, "packages-"+key)
	m, err := readMeta(dst, key)
	if err == nil && !b.o.Refresh {
		return dst, m, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		b.log.Warn("building the packages again: the cached ones are damaged", "error", err)
	}
	if err := checkSpace(b.o.Cache, b.space); err != nil {
		return "", meta{}, err
	}
	tmp, err := os.MkdirTemp(b.o.Cache, tmpPrefix)
	if err != nil {
		return "", meta{}, fmt.Errorf("making a directory to build in: %w", err)
	}
	defer b.cleanUp(tmp)
	m, err = b.buildPackages(ctx, tmp, key, lock)
	if err != nil {
		return "", meta{}, explain(err)
	}
	b.progress("syncing", 0, 0)
	if err := publish(filepath.Join(tmp, "done"), dst); err != nil {
		return "", meta{}, explain(err)
	}
	return dst, m, nil
}

// buildPackages makes tmp/done. It leaves tmp/root and tmp/out for the caller to
// remove.
func (b *builder) buildPackages(ctx context.Context, tmp, key string, lock *os.File) (meta, error) {
	root, out, done := filepath.Join(tmp, "root"), filepath.Join(tmp, "out"), filepath.Join(tmp, "done")
	started := b.now().Unix()
	for _, d := range []string{out, done} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return meta{}, fmt.Errorf("making a directory to build in: %w", err)
		}
	}
	if err := b.bootstrap(ctx, tmp, root, out, lock); err != nil {
		return meta{}, err
	}
	if err := removeAptState(root); err != nil {
		return meta{}, err
	}
	b.progress("making the disk image", 0, 0)
	if err := os.Chmod(root, 0o755); err != nil { // becomes / of the sandbox
		return meta{}, err
	}
	err := b.ext4.makeExt4(ctx, root, filepath.Join(done, rootfsName), b.o.DiskSizeBytes, b.o.SourceDateEpoch, started)
	if err != nil {
		return meta{}, err
	}
	b.progress("collecting the kernel", 0, 0)
	return b.collect(out, done, key)
}

// bootstrap runs mmdebstrap into root; customize.sh, its hook, fills out.
func (b *builder) bootstrap(ctx context.Context, tmp, root, out string, lock *os.File) error {
	sources := b.o.Sources
	if sources == "" {
		var err error
		if sources, err = aptSources(b.etc, suite); err != nil {
			return err
		}
	}
	hook := filepath.Join(tmp, "customize.sh")
	if err := os.WriteFile(hook, []byte(customizeScript), 0o700); err != nil {
		return fmt.Errorf("writing the customize hook: %w", err)
	}
	args := []string{
		"--mode=auto", "--variant=minbase", "--format=directory",
		"--architectures=" + architecture, "--include=" + strings.Join(packages, ","),
		"--aptopt=Acquire::Retries \"3\"", "--customize-hook=" + hook,
	}
	for _, o := range dpkgOptions {
		args = append(args, "--dpkgopt="+o)
	}
	for _, o := range b.aptProxies(ctx) {
		args = append(args, "--aptopt="+o)
	}
	steps := progressSteps{report: b.progress}
	steps.next("starting mmdebstrap")
	cmd := command{
		path: b.mmdebstrap,
		args: append(args, suite, root, "-"),
		dir:  tmp,
		env: []string{
			"SOURCE_DATE_EPOCH=" + strconv.FormatInt(b.o.SourceDateEpoch, 10),
			"PYTHONHASHSEED=0", // compiled Python files would differ otherwise
			"WRENN_OUT=" + out, "WRENN_SUITE=" + suite, "WRENN_KERNEL=" + kernelPackage,
		},
		stdin: strings.NewReader(sources), contained: true, hold: lock,
		line: func(line string) {
			b.log.Debug("mmdebstrap", "line", line)
			if text, ok := strings.CutPrefix(line, "I: "); ok {
				steps.next(strings.TrimRight(text, "."))
			}
		},
	}
	if _, err := cmd.run(ctx); err != nil {
		return fmt.Errorf("installing Debian's packages: %w", err)
	}
	return nil
}

// removeAptState removes what mmdebstrap's last step, after our hook, leaves:
// the mirror's package lists, under the mirror's name, and caches that hold
// addresses of the process that wrote them.
func removeAptState(root string) error {
	for _, pattern := range []string{"var/lib/apt/lists/*", "var/cache/apt/*.bin"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return err
		}
		for _, p := range found {
			if err := os.RemoveAll(p); err != nil {
				return fmt.Errorf("removing apt's lists and caches: %w", err)
			}
		}
	}
	return nil
}

// aptProxies are the host's apt proxy settings, as apt options. mmdebstrap reads
// none of the host's apt configuration.
func (b *builder) aptProxies(ctx context.Context) []string {
	config, err := findTool("apt-config")
	if err != nil {
		return nil
	}
	text, err := command{path: config, args: []string{"dump", "--format", "%f \"%v\"%n", "Acquire"}}.run(ctx)
	if err != nil {
		return nil // the tool is there but says nothing: without proxy, then
	}
	var options []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if proxyOption.MatchString(line) {
			options = append(options, line)
		}
	}
	return options
}

var proxyOption = regexp.MustCompile(`(?i)^Acquire::https?::(Proxy|Proxy::\S+) "[^"]+"$`)

// collect moves what customize.sh put out into done, and describes it.
func (b *builder) collect(out, done, key string) (meta, error) {
	version, err := os.ReadFile(filepath.Join(out, "version"))
	if err != nil {
		return meta{}, fmt.Errorf("reading the kernel version: %w", err)
	}
	m := meta{Digest: key, KernelVersion: strings.TrimSpace(string(version))}
	if !kernelVersion.MatchString(m.KernelVersion) {
		return meta{}, fmt.Errorf("not a kernel version: %q", m.KernelVersion)
	}
	dep, err := os.ReadFile(filepath.Join(out, "modules.dep"))
	if err != nil {
		return meta{}, fmt.Errorf("reading the module dependencies: %w", err)
	}
	builtin, err := os.ReadFile(filepath.Join(out, "modules.builtin"))
	if err != nil {
		return meta{}, fmt.Errorf("reading the built-in modules: %w", err)
	}
	list, err := resolveModules(string(dep), string(builtin))
	if err != nil {
		return meta{}, err
	}
	tree := filepath.Join(out, "kernel/lib/modules", m.KernelVersion)
	if err := copyModules(tree, filepath.Join(done, modulesDir), list); err != nil {
		return meta{}, err
	}
	for _, name := range []string{kernelName, packagesTx} {
		if err := os.Rename(filepath.Join(out, name), filepath.Join(done, name)); err != nil {
			return meta{}, fmt.Errorf("collecting %s: %w", name, err)
		}
	}
	resolved, err := fileDigest(filepath.Join(done, packagesTx))
	if err != nil {
		return meta{}, err
	}
	m.Resolved = hex.EncodeToString(resolved[:])

	names := []string{kernelName, packagesTx, filepath.Join(modulesDir, orderFile)}
	for _, mod := range list {
		names = append(names, filepath.Join(modulesDir, mod.file()))
	}
	for _, name := range names {
		if err := m.add(done, name, true); err != nil {
			return meta{}, err
		}
	}
	if err := m.add(done, rootfsName, false); err != nil {
		return meta{}, err
	}
	return m, m.write(done)
}

var kernelVersion = regexp.MustCompile(`^[0-9][0-9A-Za-z.+~-]*$`)

// checkSpace says before the work, and not after, that a disk is too full.
func checkSpace(dir string, need int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("asking for free space in %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need {
		return fmt.Errorf("%s has %d MiB free, the build needs %d MiB: make room or choose another directory: %w",
			dir, free>>20, need>>20, syscall.ENOSPC)
	}
	return nil
}

// remedies turn what the tools say into what to do.
var remedies = []struct {
	says   *regexp.Regexp
	remedy string
}{
	{regexp.MustCompile(`(?i)no space left on device`),
		"the disk is full: make room or choose another directory"},
	{regexp.MustCompile(`(?i)NO_PUBKEY|is not signed|couldn't be verified|no such keyring|signatures were invalid`),
		"Debian's archive keys are missing or too old: apt-get install debian-archive-keyring"},
	{regexp.MustCompile(`(?i)could not resolve|failed to fetch|could not connect|unable to connect|connection (failed|refused|timed out)|temporary failure resolving|network is unreachable|does not have a Release file`),
		"the package mirror cannot be reached: check the network, the proxy, and the Debian entries of /etc/apt/sources.list"},
	{regexp.MustCompile(`(?i)unable to locate package|has no installation candidate|no kernel package behind`),
		"the mirror does not have every package: is it a complete mirror of Debian " + suite + " main?"},
}

// explain adds the remedy to an error that has a known one.
func explain(err error) error {
	text := err.Error()
	if errors.Is(err, syscall.ENOSPC) {
		text += " no space left on device"
	}
	for _, r := range remedies {
		if r.says.MatchString(text) {
			return fmt.Errorf("%s: %w", r.remedy, err)
		}
	}
	return err
}

// progressSteps numbers mmdebstrap's own messages.
type progressSteps struct {
	report func(step string, done, total int64)
	n      int64
}

// bootstrapSteps is about how many messages mmdebstrap prints.
const bootstrapSteps = 12

func (p *progressSteps) next(step string) {
	p.report(step, min(p.n, bootstrapSteps), bootstrapSteps)
	p.n++
}
