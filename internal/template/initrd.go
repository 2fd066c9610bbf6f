package template

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// bootModules are loaded by the initramfs, each after what it depends on: the
// transports a VMM may offer, disk and network, and what lets the guest agent
// close the TCP connections of an earlier life. "pci" marks what is skipped on a
// machine without PCI.
var bootModules = []struct{ name, bus string }{
	{"virtio_ring", ""},
	{"virtio", ""},
	{"virtio_mmio", ""},
	{"virtio_pci_legacy_dev", "pci"},
	{"virtio_pci_modern_dev", "pci"},
	{"virtio_pci", "pci"},
	{"virtio_blk", ""},
	{"virtio_net", ""},
	{"inet_diag", ""},
	{"tcp_diag", ""},
}

// maxModule bounds a decompressed module, in bytes.
const maxModule = 64 << 20

// bootModule is a module of the initramfs.
type bootModule struct {
	path string // below lib/modules/<version>, possibly compressed
	bus  string
}

// file is the module's name in the initramfs.
func (m bootModule) file() string {
	base := filepath.Base(m.path)
	name, _, _ := strings.Cut(base, ".ko")
	return name + ".ko"
}

// resolveModules orders bootModules and everything they depend on so that each
// follows its dependencies. dep and builtin are the texts of modules.dep and
// modules.builtin. A module that is built into the kernel is left out.
func resolveModules(dep, builtin string) ([]bootModule, error) {
	paths := map[string]string{} // name -> path
	needs := map[string][]string{}
	for line := range strings.Lines(dep) {
		path, list, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			return nil, fmt.Errorf("modules.dep: no colon in %q", line)
		}
		paths[moduleName(path)] = path
		needs[moduleName(path)] = strings.Fields(list)
	}
	inKernel := map[string]bool{}
	for line := range strings.Lines(builtin) {
		inKernel[moduleName(strings.TrimSpace(line))] = true
	}

	var order []bootModule
	var add func(name, bus string, depth int) error
	add = func(name, bus string, depth int) error {
		if inKernel[name] || slices.ContainsFunc(order, func(m bootModule) bool { return moduleName(m.path) == name }) {
			return nil
		}
		path, ok := paths[name]
		if !ok {
			return fmt.Errorf("kernel module %s is neither a file nor built in", name)
		}
		if depth > 32 {
			return fmt.Errorf("kernel module %s: dependencies go round in a circle", name)
		}
		// modules.dep lists the module nearest to the kernel last.
		for _, p := range slices.Backward(needs[name]) {
			if err := add(moduleName(p), bus, depth+1); err != nil {
				return err
			}
		}
		order = append(order, bootModule{path: path, bus: bus})
		return nil
	}
	for _, m := range bootModules {
		// Kernels differ in how virtio_pci is split up.
		if strings.HasSuffix(m.name, "_dev") && paths[m.name] == "" {
			continue
		}
		if err := add(m.name, m.bus, 0); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleName is the kernel's name of a module file: no directory, no suffix,
// underscores.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// copyModules puts the boot modules, decompressed, and their order file into
// the new directory dst.
func copyModules(tree, dst string, list []bootModule) error {
	if err := os.Mkdir(dst, 0o700); err != nil {
		return fmt.Errorf("making the module directory: %w", err)
	}
	var order strings.Builder
	for _, m := range list {
		text, err := readModule(filepath.Join(tree, m.path))
		if err != nil {
			return fmt.Errorf("kernel module %s: %w", m.path, err)
		}
		if err := os.WriteFile(filepath.Join(dst, m.file()), text, 0o600); err != nil {
			return fmt.Errorf("writing kernel module: %w", err)
		}
		order.WriteString(strings.TrimSpace(m.file()+" "+m.bus) + "\n")
	}
	if err := os.WriteFile(filepath.Join(dst, orderFile), []byte(order.String()), 0o600); err != nil {
		return fmt.Errorf("writing the module order: %w", err)
	}
	return nil
}

// orderFile names, within the modules directory, what to load and in which order.
const orderFile = "order"

// readModule reads a module, decompressing as its name says.
func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var r io.Reader = bufio.NewReader(f)
	switch filepath.Ext(path) {
	case ".ko":
	case ".xz":
		if r, err = xz.NewReader(r); err != nil {
			return nil, fmt.Errorf("decompressing: %w", err)
		}
	case ".zst":
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, fmt.Errorf("decompressing: %w", err)
		}
		defer d.Close()
		r = d
	default:
		return nil, fmt.Errorf("unknown compression %q", filepath.Ext(path))
	}
	text, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("reading: %w", err)
	}
	if len(text) > maxModule {
		return nil, fmt.Errorf("larger than %d bytes", maxModule)
	}
	if !bytes.HasPrefix(text, []byte("\x7fELF")) {
		return nil, errors.New("not an ELF object")
	}
	return text, nil
}

// writeInitrd packs the initramfs: envd as /init and the modules directory. It
// is not compressed: unpacking costs an emulated guest more than loading does.
func writeInitrd(dst, envd, modules string, epoch int64) (err error) {
	f, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("creating the initramfs: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	out := bufio.NewWriterSize(f, 1<<20)
	w := cpio.NewWriter(out)
	a := archive{w: w, epoch: time.Unix(epoch, 0)}
	// /dev/console comes from the archive built into the kernel.
	for _, dir := range []string{"dev", "proc", "sys", "newroot", "modules"} {
		if err := a.dir(dir); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(modules) // sorted by name
	if err != nil {
		return fmt.Errorf("reading the boot modules: %w", err)
	}
	for _, e := range entries {
		if err := a.file("modules/"+e.Name(), filepath.Join(modules, e.Name()), 0o600); err != nil {
			return err
		}
	}
	if err := a.file("init", envd, 0o755); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("ending the initramfs: %w", err)
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("writing the initramfs: %w", err)
	}
	return nil
}

// archive writes entries that depend on nothing but their content.
type archive struct {
	w     *cpio.Writer
	epoch time.Time
	inode int64
}

func (a *archive) header(name string, mode cpio.FileMode, links int, size int64) error {
	a.inode++
	err := a.w.WriteHeader(&cpio.Header{
		Name: name, Mode: mode, Links: links, Size: size, ModTime: a.epoch, Inode: a.inode,
	})
	if err != nil {
		return fmt.Errorf("initramfs entry %s: %w", name, err)
	}
	return nil
}

func (a *archive) dir(name string) error { return a.header(name, cpio.TypeDir|0o755, 2, 0) }

func (a *archive) file(name, path string, mode cpio.FileMode) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("initramfs entry %s: %w", name, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("initramfs entry %s: %w", name, err)
	}
	if err := a.header(name, cpio.TypeReg|mode, 1, st.Size()); err != nil {
		return err
	}
	if _, err := io.Copy(a.w, f); err != nil {
		return fmt.Errorf("initramfs entry %s: %w", name, err)
	}
	return nil
}
