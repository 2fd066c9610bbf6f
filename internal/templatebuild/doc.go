// Package templatebuild makes templates by the steps that the published E2B
// SDKs send: a build runs them in a sandbox of its own and ends as a snapshot.
// It composes what the control plane has (create, exec, write file, snapshot)
// and knows nothing of hosts.
//
// Imported by internal/store (its tables) and cmd/wrenn; it may import control.
//
// Invariants:
//
//  1. A build goes waiting → building → ready or error, once. A name's tag
//     points at a ready build or at none; it moves in the same transaction in
//     which the build becomes ready, so that a failed build changes nothing.
//  2. One build of a name runs at a time; who comes second is refused.
//  3. Whatever ends a build (an error, its limit, a cancel, a crash) its sandbox
//     is destroyed, and its snapshot too unless the build is ready.
//  4. Builds outlive no server: one that a restart finds under way has failed,
//     and says so.
//  5. Everything that a guest prints or a client sends is bounded: lines, log,
//     uploads, steps.
//
// A template's variables, user and directory are kept in its own disk, at
// DefaultsPath, where the guest agent reads them whenever it starts a process.
package templatebuild
