package pager

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// record is what a pager that takes over needs to know of one sandbox. It
// lives as long as a boot of the host (a VM does not survive more), so it is
// renamed into place but not fsynced.
type record struct {
	SandboxID string        `json:"sandbox_id"`
	Memory    *memoryRecord `json:"memory,omitempty"`
	Disk      *diskRecord   `json:"disk,omitempty"`
}

type memoryRecord struct {
	ImageID  format.ID `json:"image_id"`
	KeepWarm bool      `json:"keep_warm,omitempty"`
	// Attachment is absent between PrepareMemory and AttachMemory.
	Attachment *uffd.AttachmentRecord `json:"attachment,omitempty"`
	// Copy is there in copy mode only.
	Copy *copyRecord `json:"copy,omitempty"`
	// Whole: the VM maps a file that has the whole image.
	Whole bool `json:"whole,omitempty"`
}

type copyRecord struct {
	SocketPath string `json:"socket_path"`
	// PID and StartTime of the process expected to hand over, 0 before
	// AttachMemory.
	PID       int    `json:"pid,omitempty"`
	StartTime uint64 `json:"start_time,omitempty"`
}

type diskRecord struct {
	ImageID     format.ID `json:"image_id"`
	OverlayPath string    `json:"overlay_path"`
	SocketPath  string    `json:"socket_path"`
}

const (
	recordSuffix = ".json"
	pagesSuffix  = ".pages" // uffd.PageMap
)

func pagesPath(dir, id string) string { return filepath.Join(dir, id+pagesSuffix) }

func removePages(dir, id string) error {
	if err := os.Remove(pagesPath(dir, id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the page map of %s: %w", id, err)
	}
	return nil
}

func writeRecord(dir string, r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode the pager's record of %s: %w", r.SandboxID, err)
	}
	path := filepath.Join(dir, r.SandboxID+recordSuffix)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, b) {
		return nil // who takes a sandbox over says what is known; a full disk must not refuse that
	}
	if err := os.WriteFile(path+".tmp", b, 0o600); err != nil {
		return fmt.Errorf("write the pager's record: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("put the pager's record in place: %w", err)
	}
	return nil
}

func removeRecord(dir, id string) error {
	err := os.Remove(filepath.Join(dir, id+recordSuffix))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the pager's record of %s: %w", id, err)
	}
	return nil
}

// readRecords returns the records of dir; one that cannot be read is an error
// of its own and does not hide the others.
func readRecords(dir string) ([]record, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list the pager's records: %w", err)
	}
	var out []record
	var errs []error
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok || !sandboxID.MatchString(id) {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			errs = append(errs, fmt.Errorf("read the record of %s: %w", id, err))
			continue
		}
		var r record
		if err := json.Unmarshal(b, &r); err != nil || r.SandboxID != id {
			errs = append(errs, fmt.Errorf("the record of %s is damaged: %v", id, err))
			continue
		}
		out = append(out, r)
	}
	return out, errors.Join(errs...)
}
