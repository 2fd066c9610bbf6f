package control

import (
	"context"
	"errors"
	"fmt"
	"regexp"
)

// CreateSnapshot freezes a running or paused sandbox under a name that is free.
// The source is in the same state afterwards.
func (s *Service) CreateSnapshot(ctx context.Context, sandboxID, name string) (Template, error) {
	return s.createSnapshot(ctx, sandboxID, name, false)
}

// ReplaceSnapshot is CreateSnapshot, but a snapshot that has the name gives way:
// the name stands for the new one as soon as that is durable. What was made
// from the old one is not touched.
func (s *Service) ReplaceSnapshot(ctx context.Context, sandboxID, name string) (Template, error) {
	return s.createSnapshot(ctx, sandboxID, name, true)
}

// builtRE is what snapshots of template builds are called; tags lead to them.
var builtRE = regexp.MustCompile(`\.[0-9]{12}$`)

func (s *Service) createSnapshot(ctx context.Context, sandboxID, name string, replace bool) (_ Template, err error) {
	if err := ValidateID("sandbox_id", sandboxID); err != nil {
		return Template{}, err
	}
	if err := ValidateName("name", name); err != nil {
		return Template{}, err
	}
	if isForkName(name) {
		return Template{}, Invalid("name", "%s… is how the server names snapshots that live as long as a fork; choose another name", forkPrefix)
	}
	ctx, cancel := s.detach(ctx)
	defer cancel()
	releaseName := s.names.try(name)
	if releaseName == nil {
		return Template{}, errorf(CodeConflict, "name: snapshot %q has another operation under way", name)
	}
	defer releaseName()
	s.snapshots.Add(1)
	switch have, err := s.store.GetTemplate(ctx, name); {
	case err == nil && (!replace || have.Type != TemplateSnapshot || builtRE.MatchString(name)):
		return Template{}, nameTaken(name)
	case err != nil && !errors.Is(err, ErrNotFound):
		return Template{}, fmt.Errorf("read template %s: %w", name, err)
	}
	src, release, err := s.hold(ctx, sandboxID, "snapshot")
	if err != nil {
		return Template{}, err
	}
	defer release()
	defer s.observe("snapshot")(&err)
	defer s.noted(ctx, sandboxID, EventSnapshot, name)(&err)
	t, err := s.host.CreateSnapshot(ctx, sandboxID, name, replace)
	if err != nil {
		s.log.WarnContext(ctx, "snapshot failed", "sandbox", sandboxID, "name", name, "err", err)
		s.wake() // The source may be lost, or the snapshot made after all.
		return Template{}, fmt.Errorf("snapshot %s: %w", sandboxID, err)
	}
	t.Name, t.Type = name, TemplateSnapshot
	t.Parent = src.Template
	if t.VCPUs == 0 || t.MemoryMB == 0 {
		t.VCPUs, t.MemoryMB = src.VCPUs, src.MemoryMB
	}
	if t.CreatedAt.IsZero() {
		t.CreatedAt = s.clock.Now()
	}
	t.CreatedAt = stamp(t.CreatedAt)
	if err := s.store.PutTemplate(ctx, t); err != nil {
		s.wake() // It is on the host; reconciling adopts it.
		return Template{}, fmt.Errorf("insert snapshot %s: %w", name, err)
	}
	return t, nil
}

func nameTaken(name string) *Error {
	return errorf(CodeConflict, "name: there is a template or snapshot %q already; choose another name or delete it first", name)
}

// hold takes the operation lock of a sandbox that is running or paused and
// stays so.
func (s *Service) hold(ctx context.Context, id, op string) (Sandbox, func(), error) {
	if _, err := s.row(ctx, id); err != nil {
		return Sandbox{}, nil, err
	}
	release := s.ops.try(id)
	if release == nil {
		return Sandbox{}, nil, busy(id, op)
	}
	// Read again under the lock: the state cannot change now but by a delete,
	// which waits for us.
	sb, err := s.row(ctx, id)
	if err == nil && sb.Status != StatusRunning && sb.Status != StatusPaused {
		err = wrongState(sb, op, "running or paused")
	}
	if err != nil {
		release()
		return Sandbox{}, nil, err
	}
	return sb, release, nil
}

// GetSnapshot reads one template or snapshot.
func (s *Service) GetSnapshot(ctx context.Context, name string) (Template, error) {
	if err := ValidateName("name", name); err != nil {
		return Template{}, err
	}
	t, err := s.store.GetTemplate(ctx, name)
	if errors.Is(err, ErrNotFound) {
		return t, errorf(CodeNotFound, "there is no snapshot %q", name)
	}
	return t, err
}

// ListSnapshots reads templates and snapshots in order of name.
func (s *Service) ListSnapshots(ctx context.Context, f TemplateFilter) ([]Template, error) {
	if f.Type != "" && f.Type != TemplateBase && f.Type != TemplateSnapshot {
		return nil, Invalid("type", "must be %q or %q", TemplateBase, TemplateSnapshot)
	}
	return s.store.ListTemplates(ctx, f)
}

// DeleteSnapshot removes a snapshot's name. What was created from it is not
// touched. Base templates are not deleted this way.
func (s *Service) DeleteSnapshot(ctx context.Context, name string) (err error) {
	if err := ValidateName("name", name); err != nil {
		return err
	}
	ctx, cancel := s.detach(WithReserve(ctx))
	defer cancel()
	release := s.names.try(name)
	if release == nil {
		return errorf(CodeConflict, "name: snapshot %q has another operation under way", name)
	}
	defer release()
	s.snapshots.Add(1)
	t, err := s.GetSnapshot(ctx, name)
	if err != nil {
		return err
	}
	if t.Type == TemplateBase {
		return errorf(CodeConflict, "name: %q is a base template, not a snapshot; wrenn template rm removes it", name)
	}
	defer s.observe("delete_snapshot")(&err)
	if err := s.host.DeleteSnapshot(ctx, name); err != nil && CodeOf(err) != CodeNotFound {
		return fmt.Errorf("delete snapshot %s: %w", name, err)
	}
	if err := s.store.DeleteTemplate(ctx, name); err != nil && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("delete snapshot row %s: %w", name, err)
	}
	return nil
}
