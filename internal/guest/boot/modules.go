package boot

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	moduleDir   = "/modules"
	moduleOrder = moduleDir + "/order"
)

// module is one line of the order file: a file name below /modules and,
// optionally, the bus without which the module is of no use.
type module struct {
	file string
	bus  string // "" or "pci"
}

// parseOrder reads the order file. Lines are "<file>.ko [bus]"; blank lines and
// lines starting with # are skipped.
func parseOrder(text string) ([]module, error) {
	var list []module
	sc := bufio.NewScanner(strings.NewReader(text))
	for n := 1; sc.Scan(); n++ {
		f := strings.Fields(sc.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		m := module{file: f[0]}
		if len(f) > 1 {
			m.bus = f[1]
		}
		if len(f) > 2 || m.bus != "" && m.bus != "pci" {
			return nil, fmt.Errorf("%s line %d: want \"file [pci]\", got %q", moduleOrder, n, sc.Text())
		}
		if m.file != filepath.Base(m.file) {
			return nil, fmt.Errorf("%s line %d: %q is not a file name", moduleOrder, n, m.file)
		}
		list = append(list, m)
	}
	return list, sc.Err()
}

// loadModules loads what order lists, in that order, skipping the modules of a
// bus that this machine does not have (each costs milliseconds when emulated).
func loadModules() error {
	text, err := os.ReadFile(moduleOrder)
	if err != nil {
		return fmt.Errorf("reading the module list: %w", err)
	}
	list, err := parseOrder(string(text))
	if err != nil {
		return err
	}
	pci := hasPCI()
	for _, m := range list {
		if m.bus == "pci" && !pci {
			continue
		}
		if err := loadModule(filepath.Join(moduleDir, m.file)); err != nil {
			return err
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("opening module: %w", err)
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("loading module %s: %w", path, err)
	}
	return nil
}

// hasPCI reports whether any PCI device exists.
func hasPCI() bool {
	devices, err := os.ReadDir("/sys/bus/pci/devices")
	return err == nil && len(devices) > 0
}
