package controltest

import (
	"context"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// SetGarbage says what nothing needs on the host.
func (h *Host) SetGarbage(items ...control.GarbageItem) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.garbage = control.Garbage{Items: items}
	for _, it := range items {
		h.garbage.Bytes += it.Bytes
	}
}

// CollectGarbage implements control.Host.
func (h *Host) CollectGarbage(_ context.Context, dryRun bool) (control.Garbage, error) {
	if err := h.enter("collect_garbage"); err != nil {
		return control.Garbage{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.garbage
	if !dryRun {
		h.garbage = control.Garbage{}
	}
	return g, nil
}
