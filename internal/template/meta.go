package template

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

const (
	metaName   = "meta.json"
	rootfsName = "rootfs.ext4"
	kernelName = "vmlinuz"
	initrdName = "initrd"
	modulesDir = "modules"
	packagesTx = "packages"
)

// meta describes a finished directory of either stage; it is written last.
type meta struct {
	Digest        string          `json:"digest"` // names the directory
	Packages      string          `json:"packages_digest,omitempty"`
	Resolved      string          `json:"resolved"` // SHA-256 of the list of package versions
	Envd          string          `json:"envd_sha256,omitempty"`
	KernelVersion string          `json:"kernel_version"`
	Files         map[string]file `json:"files"`
}

// file is what is known about a file: its size, and its digest where it is
// small enough to be checked on every use.
type file struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256,omitempty"`
}

// readMeta returns the description of the directory, or an error if anything
// is missing or not as described.
func readMeta(dir, digest string) (meta, error) {
	var m meta
	text, err := os.ReadFile(filepath.Join(dir, metaName))
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("%s: %w", metaName, err)
	}
	if m.Digest != digest {
		return m, fmt.Errorf("%s describes %q, want %q", metaName, m.Digest, digest)
	}
	for name, want := range m.Files {
		if !filepath.IsLocal(name) {
			return m, fmt.Errorf("%s names the file %q", metaName, name)
		}
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			return m, err
		}
		if st.Size() != want.Size {
			return m, fmt.Errorf("%s has %d bytes, want %d", name, st.Size(), want.Size)
		}
		if want.SHA256 == "" {
			continue
		}
		got, err := fileDigest(filepath.Join(dir, name))
		if err != nil {
			return m, err
		}
		if hex.EncodeToString(got[:]) != want.SHA256 {
			return m, fmt.Errorf("%s has changed", name)
		}
	}
	return m, nil
}

// add records a file of dir; digested ones are verified on every use.
func (m *meta) add(dir, name string, digested bool) error {
	st, err := os.Stat(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	f := file{Size: st.Size()}
	if digested {
		sum, err := fileDigest(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		f.SHA256 = hex.EncodeToString(sum[:])
	}
	if m.Files == nil {
		m.Files = map[string]file{}
	}
	m.Files[name] = f
	return nil
}

func (m *meta) write(dir string) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding %s: %w", metaName, err)
	}
	if err := os.WriteFile(filepath.Join(dir, metaName), append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing %s: %w", metaName, err)
	}
	return nil
}
