package engine

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// A pause is whole without its journal: its manifest keeps, as its annotations,
// the journal that the sandbox has while it is paused. So a sandbox whose
// journal was lost, damaged, or put back from an older copy is found again.

// maxKept bounds what a manifest keeps of a journal, with room for its coding.
const maxKept = 512 << 10

// kept is what the manifest of a pause keeps of a journal. What is too
// large for it is left out: a pause must not fail for its own safety net.
func (j journal) kept() ([]byte, error) {
	j.State, j.Error, j.StartedAt, j.Run = Paused, "", nil, nil
	j.Manifest, j.Generation, j.Pending = format.ID{}, 0, format.ID{} // the manifest itself says it
	for _, less := range []func(){func() {}, func() { j.Envs = nil }, func() { j.Annotations = nil }, func() { j.Egress = nil }} {
		less()
		b, err := json.Marshal(j)
		if err != nil {
			return nil, fmt.Errorf("encode the journal of %s for its pause: %w", j.ID, err)
		}
		if len(b) <= maxKept {
			return b, nil
		}
	}
	return nil, nil
}

// journalOf makes the journal of a paused sandbox from its pause. One of a
// program that kept no journal there has a new token and machine id, and no
// environment.
func journalOf(m snapshot.Manifest) (journal, error) {
	if err := checkID(m.SandboxID); err != nil {
		return journal{}, err
	}
	j, err := decodeJournal(m.Annotations, m.SandboxID)
	if errors.Is(err, errNewerJournal) {
		return j, err
	}
	if err != nil {
		j = journal{
			Version: journalVersion, ID: m.SandboxID, Annotations: m.Annotations, CreatedAt: m.CreatedAt,
			AccessToken: randomHex(32), MachineID: randomHex(16),
		}
	}
	j.State, j.Template, j.VCPUs, j.MemoryMB = Paused, m.Parent, m.VMM.VCPUs, m.VMM.MemoryMB
	j.Manifest, j.Generation = m.ID, m.Generation
	return j, nil
}

// newestPauses are the newest pauses by sandbox.
func newestPauses(manifests []snapshot.Manifest) map[string]snapshot.Manifest {
	out := map[string]snapshot.Manifest{}
	for _, m := range manifests {
		if m.Kind != snapshot.KindPause {
			continue
		}
		old, there := out[m.SandboxID]
		if !there || cmp.Or(cmp.Compare(m.Generation, old.Generation), m.CreatedAt.Compare(old.CreatedAt)) > 0 {
			out[m.SandboxID] = m
		}
	}
	return out
}

// enterLost enters a sandbox that has a directory or a pause and no journal
// that could be read.
func (e *Engine) enterLost(ctx context.Context, id string, why error, pause *snapshot.Manifest) error {
	sb := &sandbox{dir: e.sandboxDir(id), op: make(chan struct{}, 1)}
	if err := os.MkdirAll(sb.dir, 0o711); err != nil {
		return fmt.Errorf("make the directory of sandbox %s, whose journal is lost: %w", id, err)
	}
	j, err := journal{
		Version: journalVersion, ID: id, CreatedAt: e.opts.Now().UTC(), AccessToken: randomHex(32), MachineID: randomHex(16),
		State: Failed, Error: "its journal is lost, and it has no pause to go back to; delete it",
	}, error(nil)
	if pause != nil {
		if j, err = journalOf(*pause); err != nil {
			return fmt.Errorf("sandbox %s: read its journal from its pause: %w", id, err)
		}
	}
	if pids := vmm.Holders(sb.dir); len(pids) > 0 {
		// Without the journal it cannot be taken over, and what is not known
		// is not killed. Nothing is written: a start without it thinks anew.
		sb.stray = true
		j.State = Failed
		j.Error = fmt.Sprintf("its journal is lost and its virtual machine runs (process %d): delete the sandbox, or end that process and restart the server to have the last pause", pids[0])
	} else {
		if err := errors.Join(keepDamaged(sb.dir), e.stopServing(ctx, sb), writeJournal(sb.dir, j)); err != nil {
			return fmt.Errorf("make the journal of sandbox %s again: %w", id, err)
		}
	}
	sb.j = j
	e.log.WarnContext(ctx, "the journal of a sandbox is lost", "sandbox", id, "err", why, "state", j.State, "generation", j.Generation, "reason", j.Error)
	e.mu.Lock()
	e.sandboxes[id] = sb
	e.mu.Unlock()
	return nil
}

// keepDamaged puts a journal that cannot be read aside, for who wants to know.
func keepDamaged(dir string) error {
	path := filepath.Join(dir, journalName)
	if err := os.Rename(path, path+".damaged"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// halfMade tells whether a directory is what a create leaves that was cut off
// before its first journal: nothing was promised of it.
func halfMade(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && !slices.ContainsFunc(entries, func(f os.DirEntry) bool { return f.Name() != journalName+".tmp" })
}

// goToNewest lets a sandbox that has no run go to a pause that its journal never
// heard of: the journal is older than what it tells of.
func (e *Engine) goToNewest(sb *sandbox, newest map[string]snapshot.Manifest) error {
	j := sb.journal()
	m, there := newest[j.ID]
	if !there || sb.stray || !older(j, m) || sb.current() != nil || j.Run != nil || j.State != Paused && j.State != Failed {
		return nil
	}
	e.log.Warn("the journal of a sandbox is older than its newest pause, which is taken", "sandbox", j.ID, "journal", j.Generation, "pause", m.Generation)
	return sb.update(func(j *journal) {
		j.State, j.Error, j.StartedAt = Paused, "", nil
		j.Manifest, j.Generation, j.Pending = m.ID, m.Generation, format.ID{}
	})
}

// older tells whether a pause came after the journal was written.
func older(j journal, m snapshot.Manifest) bool {
	return m.ID != j.Manifest && m.ID != j.Pending && m.Generation > j.Generation
}
