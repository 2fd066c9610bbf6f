package vmm

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Verdict is what a boot said about an accelerator on this host.
type Verdict struct {
	// Key names all that it depends on: host kernel, VMM version, guest
	// kernel. With another key the verdict counts for nothing.
	Key     string    `json:"key"`
	Works   bool      `json:"works"`
	Finding string    `json:"finding"` // for people
	At      time.Time `json:"at"`
}

// LoadVerdict reads the verdict for key; a missing, damaged or foreign file
// holds none. An empty path has none either.
func LoadVerdict(path, key string) (Verdict, bool) {
	if path == "" {
		return Verdict{}, false
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return Verdict{}, false
	}
	var v Verdict
	if err := json.Unmarshal(b, &v); err != nil || v.Key != key {
		return Verdict{}, false
	}
	return v, true
}

// SaveVerdict replaces the file atomically (0600). It is a cache: losing it
// in a crash costs one more boot, so nothing is synced. With an empty path it
// does nothing.
func SaveVerdict(path string, v Verdict) error {
	if path == "" {
		return nil
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("saving the probe's verdict: %w", err)
	}
	defer os.Remove(tmp.Name()) // gone after the rename
	_, err = tmp.Write(append(b, '\n'))
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("saving the probe's verdict: %w", err)
	}
	return nil
}
