package snapshot

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// Kinds of snapshots.
const (
	KindBase     = "base"     // a disk image that a machine boots from
	KindSnapshot = "snapshot" // named: any number of machines start from it
	KindPause    = "pause"    // a paused machine
)

// Limits of a manifest.
const (
	maxManifest    = 4 << 20 // bytes of the file
	maxAnnotations = 1 << 20 // bytes
	maxText        = 4096    // bytes of each text
	// MaxState bounds the device state of a machine, in bytes.
	MaxState = 1 << 30
)

// Manifest describes a snapshot: a memory image, a disk image and the device
// state of one moment. It is the only thing that makes them reachable.
type Manifest struct {
	ID         format.ID `json:"id"`         // set by Commit
	Name       string    `json:"name"`       // of a template; may be empty for a pause
	Kind       string    `json:"kind"`       // KindBase, KindSnapshot or KindPause
	SandboxID  string    `json:"sandbox_id"` // where it was taken
	Parent     string    `json:"parent"`     // name of what the sandbox was made from
	Generation uint64    `json:"generation"`
	CreatedAt  time.Time `json:"created_at"` // set by Commit if zero

	Memory ImageRef `json:"memory"` // zero ID: none
	Disk   ImageRef `json:"disk"`   // zero ID: none
	State  FileRef  `json:"state"`  // set by Commit

	VMM           VMMInfo `json:"vmm"`
	EnvdVersion   string  `json:"envd_version"`
	NetworkLayout string  `json:"network_layout"`
	Annotations   []byte  `json:"annotations"` // the owner's own, opaque, ≤ 1 MiB
	Size          int64   `json:"size"`        // bytes that it added to the store; set by Commit if zero
}

// ImageRef names an image. Commit sets all but the ID.
type ImageRef struct {
	ID           format.ID `json:"id"`
	Size         int64     `json:"size"` // bytes of the image, not of its storage
	HeaderSHA256 string    `json:"header_sha256"`
}

// FileRef describes the state file; an empty digest means that there is none.
type FileRef struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// VMMInfo is what a restore must match.
type VMMInfo struct {
	Kind           string `json:"kind"` // "qemu", "firecracker"
	Version        string `json:"version"`
	MachineType    string `json:"machine_type"`
	CPUModel       string `json:"cpu_model"`
	CPUFlagsDigest string `json:"cpu_flags_digest"`
	Accel          string `json:"accel"` // "kvm", "tcg"
	TSCKHz         int64  `json:"tsc_khz"`
	KernelDigest   string `json:"kernel_digest"`
	VCPUs          int    `json:"vcpus"`
	MemoryMB       int    `json:"memory_mb"`
}

// validate checks what the store relies on and what keeps the file bounded;
// the meaning of names is the owner's matter.
func (m *Manifest) validate() error {
	field := func(name, reason string, args ...any) error {
		return fmt.Errorf("manifest: %s: %s", name, fmt.Sprintf(reason, args...))
	}
	switch m.Kind {
	case KindBase, KindSnapshot, KindPause:
	default:
		return field("kind", "%.40q is not known", m.Kind)
	}
	texts := map[string]string{
		"name": m.Name, "sandbox_id": m.SandboxID, "parent": m.Parent,
		"envd_version": m.EnvdVersion, "network_layout": m.NetworkLayout,
		"vmm.kind": m.VMM.Kind, "vmm.version": m.VMM.Version, "vmm.machine_type": m.VMM.MachineType,
		"vmm.cpu_model": m.VMM.CPUModel, "vmm.cpu_flags_digest": m.VMM.CPUFlagsDigest,
		"vmm.accel": m.VMM.Accel, "vmm.kernel_digest": m.VMM.KernelDigest,
	}
	for name, s := range texts {
		// The file is JSON, which would change invalid UTF-8 silently.
		if len(s) > maxText || strings.ToValidUTF8(s, "") != s {
			return field(name, "is longer than %d bytes or not UTF-8", maxText)
		}
	}
	switch {
	case m.ID.IsZero():
		return field("id", "is zero")
	case m.Memory.ID.IsZero() && m.Disk.ID.IsZero():
		return field("memory, disk", "both are missing")
	case m.Memory.ID == m.Disk.ID:
		return field("disk", "is the memory image")
	case len(m.Annotations) > maxAnnotations:
		return field("annotations", "%d bytes are more than the limit %d", len(m.Annotations), maxAnnotations)
	case m.Size < 0:
		return field("size", "%d is negative", m.Size)
	case m.State.Size < 0 || m.State.Size > MaxState:
		return field("state.size", "%d is not in 0…%d", m.State.Size, MaxState)
	case m.State.SHA256 == "" && m.State.Size != 0, m.State.SHA256 != "" && !isDigest(m.State.SHA256):
		return field("state.sha256", "is no SHA-256")
	}
	for name, ref := range map[string]ImageRef{"memory": m.Memory, "disk": m.Disk} {
		if ref.ID.IsZero() {
			if ref != (ImageRef{}) {
				return field(name+".id", "is zero")
			}
			continue
		}
		if ref.Size < 0 || ref.Size%blockSize != 0 {
			return field(name+".size", "%d is not a whole number of blocks", ref.Size)
		}
		if !isDigest(ref.HeaderSHA256) {
			return field(name+".header_sha256", "is no SHA-256")
		}
	}
	return nil
}

func isDigest(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size && s == hex.EncodeToString(b)
}

func digestOf(b []byte) string {
	d := sha256.Sum256(b)
	return hex.EncodeToString(d[:])
}

// images returns the images that the manifest names.
func (m *Manifest) images() []ImageRef {
	var out []ImageRef
	for _, r := range []ImageRef{m.Memory, m.Disk} {
		if !r.ID.IsZero() {
			out = append(out, r)
		}
	}
	return out
}

// manifestFile is manifest.json, version 1: the digest is over the bytes of
// the manifest as they stand in the file.
type manifestFile struct {
	Version  int             `json:"version"`
	SHA256   string          `json:"sha256"`
	Manifest json.RawMessage `json:"manifest"`
}

const manifestVersion = 1

func encodeManifest(m *Manifest) ([]byte, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return wrapManifest(raw)
}

func wrapManifest(raw []byte) ([]byte, error) {
	b, err := json.Marshal(manifestFile{Version: manifestVersion, SHA256: digestOf(raw), Manifest: raw})
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return append(b, '\n'), nil
}

func decodeManifest(b []byte) (*Manifest, error) {
	if len(b) > maxManifest {
		return nil, fmt.Errorf("manifest: length: %d bytes are more than the limit %d", len(b), maxManifest)
	}
	var f manifestFile
	if err := unmarshalStrict(b, &f); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if f.Version != manifestVersion {
		return nil, fmt.Errorf("manifest: version: %d is not known, want %d", f.Version, manifestVersion)
	}
	if digestOf(f.Manifest) != f.SHA256 {
		return nil, errors.New("manifest: sha256: does not fit the content")
	}
	// JSON has many spellings of one value; only ours is accepted, so that a
	// changed byte is always found.
	if same, err := wrapManifest(f.Manifest); err != nil || !bytes.Equal(same, b) {
		return nil, errors.New("manifest: the file is not in the form in which it was written")
	}
	var m Manifest
	if err := unmarshalStrict(f.Manifest, &m); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return &m, m.validate()
}

func unmarshalStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if len(bytes.TrimSpace(b[d.InputOffset():])) != 0 {
		return errors.New("there is something after the end")
	}
	return nil
}

// Manifest returns the manifest of a snapshot, or ErrNotFound.
func (s *Store) Manifest(id format.ID) (Manifest, error) {
	name := s.manifestPath(id)
	b, err := s.readAll(name, maxManifest)
	if err != nil {
		return Manifest{}, fmt.Errorf("snapshot %s: %w", id, err)
	}
	m, err := decodeManifest(b)
	if err == nil && m.ID != id {
		err = fmt.Errorf("manifest: id: it is the manifest of snapshot %s", m.ID)
	}
	if err != nil {
		return Manifest{}, fmt.Errorf("snapshot %s: %w", id, &CorruptError{Image: id, File: name, Reason: err.Error()})
	}
	return *m, nil
}

// Manifests returns every readable manifest, and an error for every other one.
func (s *Store) Manifests() ([]Manifest, []error) {
	ids, err := s.list(s.snapshotsDir())
	if err != nil {
		return nil, []error{fmt.Errorf("list snapshots: %w", err)}
	}
	var out []Manifest
	var errs []error
	for _, id := range ids {
		m, err := s.Manifest(id)
		switch {
		case err == nil:
			out = append(out, m)
		case errors.Is(err, ErrNotFound): // unfinished, or deleted meanwhile
		default:
			errs = append(errs, err)
		}
	}
	return out, errs
}

// list returns the IDs that name the entries of a directory. Other names are
// not ours and are left alone.
func (s *Store) list(dir string) ([]format.ID, error) {
	names, err := s.fs.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ids []format.ID
	for _, n := range names {
		if id, err := format.ParseID(n); err == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}
