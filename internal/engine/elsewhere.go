package engine

import (
	"os"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
)

// vmElsewhere tells whether a journal in dir speaks of a VM of another
// directory: dir is a copy, as a restored backup is, and the VM belongs to who
// runs the original. It must be neither taken over nor killed from here.
func vmElsewhere(dir string, rec *vmm.Record) bool {
	if rec == nil || rec.Control == "" {
		return false
	}
	if _, err := os.Lstat(rec.Control); err != nil {
		return false // no VM can be spoken to there
	}
	own, err := os.Stat(dir)
	if err != nil {
		return false
	}
	// Not by name: a directory may be reached by more than one.
	for p := filepath.Dir(rec.Control); ; p = filepath.Dir(p) {
		if st, err := os.Stat(p); err == nil && os.SameFile(own, st) {
			return false
		}
		if p == filepath.Dir(p) {
			return true
		}
	}
}
