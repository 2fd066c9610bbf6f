// Package control is the control plane: what sandboxes, snapshots and API keys
// are, which state may follow which, and the operations on them. Handlers of
// internal/httpapi (and of any other wire form) translate and call a Service;
// internal/store implements Store; a host is reached through Host.
//
// Imported by internal/store, internal/httpapi, internal/e2bapi and cmd. It
// imports nothing of ours but the generated RPC types.
//
// Invariants:
//
//  1. A status changes only along the table in state.go, by compare-and-set on
//     the row's version. Of racing requests one wins; the others get
//     invalid_state.
//  2. At most one operation that changes a sandbox runs in this process at a
//     time (opLocks). Deleting is possible in every state: it takes the status
//     first, then waits for the operation under way.
//  3. An operation once accepted is detached from the caller's context; it has
//     a deadline of its own. A caller that goes away changes nothing.
//  4. The host is the truth for what exists. Reconciling adopts what the host
//     reports; it destroys only what a caller asked to delete.
//  5. The row is read before the host is asked, and written only if it has not
//     changed since: an old answer never overwrites a newer state.
//
// Time limits: timeout_sec counts from the moment the sandbox began to run
// (created or resumed) or from the last timeout call, whichever is later. It is
// a limit on the run, not on idleness: commands do not extend it. Zero, the
// default, is no limit. A paused sandbox has no limit running. At the limit the
// sandbox is paused if auto_pause is set and deleted otherwise.
package control
