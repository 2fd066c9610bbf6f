package engine

import "context"

// Abandon leaves the engine as a crash does: nothing is cleaned up, and what
// goes on by itself stops. Operations under way must be parked in AfterStep.
func (e *Engine) Abandon() { e.cancel() }

// Sweep is the garbage collection that operations end with.
func (e *Engine) Sweep(ctx context.Context) error { return e.sweep(ctx) }

// Idle tells whether nothing is under way and nothing is queued.
func (e *Engine) Idle() bool {
	e.compactor.mu.Lock()
	busy := e.compactor.busy
	e.compactor.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	busy = busy || len(e.tidying) > 0
	for _, sb := range e.sandboxes {
		busy = busy || len(sb.op) > 0
	}
	return !busy
}
