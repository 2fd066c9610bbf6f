package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// retryHost is the pause between attempts to reach a host that does not answer,
// and between looks while the host is at work on something.
const retryHost = time.Second

// watch turns the host's reports into looks at it, until ctx ends. A report is
// only a reason to look: by the time it is read it may be old.
func (s *Service) watch(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.host.WatchSandboxes(ctx, func(e HostEvent) {
			s.tellWaiting(ctx, e)
			s.wake()
		})
		if ctx.Err() != nil {
			return
		}
		s.log.InfoContext(ctx, "watch of the host ended; trying again", "err", err)
		s.wake()
		s.sleep(ctx, retryHost)
	}
}

// tellWaiting notes that a sandbox began to stand still, or goes on.
func (s *Service) tellWaiting(ctx context.Context, e HostEvent) {
	id, why := e.Sandbox.ID, e.Sandbox.Waiting
	if e.Synced {
		return
	}
	s.waitingMu.Lock()
	defer s.waitingMu.Unlock()
	s.recallWaiting(ctx)
	if e.Removed {
		delete(s.waiting, id)
		return
	}
	was := s.waiting[id]
	switch {
	case why == was:
		return
	case why != "":
		s.waiting[id] = why
		s.note(ctx, Event{SandboxID: id, Type: EventWait, Error: why})
	default:
		delete(s.waiting, id)
		s.note(ctx, Event{SandboxID: id, Type: EventGoOn, Detail: was}) // a full disk may not have taken the first event
	}
}

// recallWaiting takes in, once, what an earlier process told of sandboxes that
// stand still. waitingMu is held.
func (s *Service) recallWaiting(ctx context.Context) {
	if s.recalled {
		return
	}
	told, err := s.store.ListWaits(ctx)
	if err != nil {
		s.log.WarnContext(ctx, "read which sandboxes stood still; trying again with the next report", "err", err)
		return
	}
	s.recalled = true
	for _, e := range told {
		if _, known := s.waiting[e.SandboxID]; !known {
			s.waiting[e.SandboxID] = e.Error
		}
	}
}

// sleep waits for d or the end of ctx.
func (s *Service) sleep(ctx context.Context, d time.Duration) {
	c, stop := s.clock.NewTimer(d)
	defer stop()
	select {
	case <-ctx.Done():
	case <-c:
	}
}

func (s *Service) runReconciler(ctx context.Context) {
	for ctx.Err() == nil {
		again, err := s.Reconcile(ctx)
		if err != nil && ctx.Err() == nil {
			s.log.WarnContext(ctx, "reconcile", "err", err)
		}
		next := s.opt.ReconcileEvery
		if err != nil || again {
			next = min(next, retryHost)
		}
		c, stop := s.clock.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-c:
		case <-s.kick:
		}
		stop()
	}
}

// Reconcile takes in once what the host says. again reports that something is
// still moving. Run calls it by itself.
func (s *Service) Reconcile(ctx context.Context) (again bool, err error) {
	ctx, cancel := context.WithTimeout(WithReserve(ctx), time.Minute)
	defer cancel()
	if _, err := s.reconcileTemplates(ctx); err != nil {
		return true, err
	}
	again, err = s.reconcileSandboxes(ctx)
	if err != nil {
		return true, err
	}
	if _, err := s.store.PruneStopped(ctx, s.now().Add(-s.opt.KeepStopped)); err != nil {
		return again, fmt.Errorf("prune stopped sandboxes: %w", err)
	}
	if _, err := s.store.PruneAnswers(ctx, s.now().Add(-KeepAnswers)); err != nil {
		return again, fmt.Errorf("prune kept answers: %w", err)
	}
	s.reconciled.Store(true)
	return again, nil
}

func (s *Service) reconcileSandboxes(ctx context.Context) (again bool, err error) {
	// Rows first: whatever changes after this has a newer version.
	rows, err := s.store.ListSandboxes(ctx, SandboxFilter{})
	if err != nil {
		return false, fmt.Errorf("list sandboxes: %w", err)
	}
	list, err := s.host.ListSandboxes(ctx)
	if err != nil {
		return false, fmt.Errorf("list the host's sandboxes: %w", err)
	}
	byID := make(map[string]HostSandbox, len(list))
	for _, h := range list {
		byID[h.ID] = h
	}
	var errs []error
	for _, r := range rows {
		s.deadlines.set(r)
		h, ok := byID[r.ID]
		delete(byID, r.ID)
		moving, err := s.settle(ctx, r, h, ok)
		again = again || moving
		errs = append(errs, err)
	}
	for _, h := range byID {
		moving, err := s.adopt(ctx, h)
		again = again || moving
		errs = append(errs, err)
	}
	return again, errors.Join(errs...)
}

// settle brings one row in line with what the host said of it. Sandboxes with
// an operation under way are left to it.
func (s *Service) settle(ctx context.Context, r Sandbox, h HostSandbox, known bool) (again bool, err error) {
	if r.Status == StatusStopping {
		done := s.deleting.try(r.ID)
		if done == nil {
			return true, nil
		}
		defer done()
		release := s.ops.try(r.ID)
		if release == nil {
			return true, nil // A look does not wait for an operation.
		}
		release()
		// Not an error of the look: the host is asked again later.
		err := s.finishDelete(ctx, r.ID)
		if CodeOf(err) == CodeNotFound {
			return false, nil // Whoever was at it before us has finished it since the rows were read.
		}
		if err != nil {
			s.log.WarnContext(ctx, "finish a delete", "sandbox", r.ID, "err", err)
			return true, nil
		}
		return false, nil
	}
	to, reason, moving := verdict(h, known)
	if moving || (to == r.Status && (to != StatusError || reason == r.Error || reason == "")) {
		return moving, nil
	}
	if !known && r.Status == StatusError {
		return false, nil // It keeps its first reason.
	}
	release := s.ops.try(r.ID)
	if release == nil {
		return true, nil
	}
	defer release()
	if !known && r.Status == StatusPending {
		return false, s.forget(ctx, r)
	}
	return false, s.correct(ctx, r, to, reason, h)
}

// forget removes the row of a create that a crash cut off: nobody was told of
// the sandbox, and a create that fails leaves nothing.
func (s *Service) forget(ctx context.Context, r Sandbox) error {
	switch err := s.store.DeleteSandbox(ctx, r.ID, r.Version); {
	case errors.Is(err, ErrStale):
		s.wake()
		return nil
	case err != nil && !errors.Is(err, ErrNotFound):
		return fmt.Errorf("forget sandbox %s: %w", r.ID, err)
	}
	s.log.InfoContext(ctx, "forgot a sandbox whose create was cut off", "sandbox", r.ID)
	return nil
}

// correct writes what was found, if the row is still as it was before the host
// was asked.
func (s *Service) correct(ctx context.Context, r Sandbox, to Status, reason string, h HostSandbox) error {
	if to != r.Status && !CanFind(r.Status, to) {
		return fmt.Errorf("sandbox %s is %s and the host says %s", r.ID, r.Status, to)
	}
	next := r.clone()
	next.ChangedAt = s.now()
	if to == StatusRunning {
		s.begin(&next, h)
	} else {
		next.Status, next.Error = to, reason
		next.StartedAt, next.ExpiresAt = time.Time{}, time.Time{}
	}
	switch err := s.store.UpdateSandbox(ctx, next); {
	case errors.Is(err, ErrStale):
		s.wake()
		return nil
	case err != nil:
		return fmt.Errorf("correct sandbox %s: %w", r.ID, err)
	}
	next.Version++
	s.deadlines.set(next)
	s.log.InfoContext(ctx, "took over the host's view", "sandbox", r.ID, "from", r.Status, "to", to, "reason", reason)
	s.note(ctx, Event{SandboxID: r.ID, Type: EventFound, Status: to, Detail: "was " + string(r.Status), Error: reason})
	return nil
}

// verdict says which status the host's word means. A paused sandbox is on the
// host's list as paused, not as running: one that is nowhere has no state left.
func verdict(h HostSandbox, known bool) (to Status, reason string, moving bool) {
	if !known {
		return StatusError, "the host has neither a running machine nor a saved state of it", false
	}
	switch h.State {
	case HostRunning:
		return StatusRunning, "", false
	case HostPaused:
		return StatusPaused, "", false
	case HostError:
		if h.Error == "" {
			h.Error = "its machine ended; the host gave no reason"
		}
		return StatusError, h.Error, false
	}
	return "", "", true
}

// adopt makes a row for what the host has and the list of rows did not: the
// database was lost or is older, or the sandbox was deleted in vain.
func (s *Service) adopt(ctx context.Context, h HostSandbox) (again bool, err error) {
	if err := ValidateID("id", h.ID); err != nil {
		return false, fmt.Errorf("the host reports a sandbox %q: %w", h.ID, err)
	}
	to, reason, moving := verdict(h, true)
	if moving {
		return true, nil
	}
	release := s.ops.try(h.ID)
	if release == nil {
		return true, nil
	}
	defer release()
	switch r, err := s.store.GetSandbox(ctx, h.ID); {
	case err == nil && r.Status == StatusStopped:
		return s.bury(ctx, h.ID)
	case err == nil:
		return true, nil // It came while we looked.
	case !errors.Is(err, ErrNotFound):
		return false, fmt.Errorf("read sandbox %s: %w", h.ID, err)
	}
	var note annotations
	if len(h.Annotations) > 0 {
		if err := json.Unmarshal(h.Annotations, &note); err != nil {
			s.log.WarnContext(ctx, "annotations of an unknown sandbox; taking it over without", "sandbox", h.ID, "err", err)
			note = annotations{}
		}
	}
	sb := Sandbox{
		ID: h.ID, Template: note.Template, Status: to, Error: reason,
		VCPUs: h.VCPUs, MemoryMB: h.MemoryMB, Metadata: note.Metadata,
		TimeoutSec: note.TimeoutSec, AutoPause: note.AutoPause, Options: note.Options,
		CreatedAt: stamp(note.CreatedAt), ChangedAt: s.now(), Version: 1,
	}
	if sb.Template == "" {
		sb.Template = h.Template
	}
	if sb.CreatedAt.IsZero() {
		sb.CreatedAt = stamp(h.CreatedAt)
	}
	if sb.CreatedAt.IsZero() {
		sb.CreatedAt = s.now()
	}
	if to == StatusRunning {
		s.begin(&sb, h)
	}
	if err := s.store.CreateSandbox(ctx, sb); err != nil && !errors.Is(err, ErrExists) {
		return false, fmt.Errorf("adopt sandbox %s: %w", h.ID, err)
	}
	s.deadlines.set(sb)
	s.log.InfoContext(ctx, "adopted a sandbox that the host had", "sandbox", h.ID, "status", to)
	s.note(ctx, Event{SandboxID: h.ID, Type: EventAdopt, Status: to, Error: reason})
	return false, nil
}

// bury removes from the host what was deleted here. The caller holds the lock.
func (s *Service) bury(ctx context.Context, id string) (again bool, err error) {
	if err := s.host.DestroySandbox(ctx, id); err != nil && CodeOf(err) != CodeNotFound {
		return true, fmt.Errorf("remove deleted sandbox %s: %w", id, err)
	}
	s.log.InfoContext(ctx, "removed a deleted sandbox that the host still had", "sandbox", id)
	return false, nil
}

// reconcileTemplates makes the table of templates what the host has, and gives
// the host's list.
func (s *Service) reconcileTemplates(ctx context.Context) ([]Template, error) {
	seq := s.snapshots.Load()
	rows, err := s.store.ListTemplates(ctx, TemplateFilter{})
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	list, err := s.host.ListSnapshots(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the host's templates: %w", err)
	}
	list = slices.DeleteFunc(list, func(t Template) bool {
		bad := ValidateName("name", t.Name) != nil || (t.Type != TemplateBase && t.Type != TemplateSnapshot)
		if bad {
			s.log.WarnContext(ctx, "the host has a template of no known kind; leaving it alone", "name", t.Name, "type", t.Type)
		}
		return bad
	})
	list = slices.DeleteFunc(list, func(t Template) bool {
		fork := t.Type == TemplateSnapshot && isForkName(t.Name)
		if fork {
			s.dropFork(ctx, t.Name)
		}
		return fork
	})
	have := map[string]Template{}
	for _, r := range rows {
		have[r.Name] = r
	}
	for i := range list {
		t := &list[i]
		if t.Type == TemplateBase {
			t.VCPUs, t.MemoryMB = DefaultVCPUs, DefaultMemoryMB
		}
		if t.CreatedAt.IsZero() {
			t.CreatedAt = s.clock.Now()
		}
		t.CreatedAt = stamp(t.CreatedAt)
		old, known := have[t.Name]
		delete(have, t.Name)
		// One that was replaced, and the server killed before it wrote so, has
		// another time.
		if known && (t.Type == TemplateBase || old.CreatedAt.Equal(t.CreatedAt)) {
			continue
		}
		if err := s.correctTemplate(ctx, seq, t.Name, func() error { return s.store.PutTemplate(ctx, *t) }); err != nil {
			return nil, err
		}
	}
	for name := range have {
		if err := s.correctTemplate(ctx, seq, name, func() error { return s.store.DeleteTemplate(ctx, name) }); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// dropFork removes the snapshot of a fork that was cut off. One under way holds
// its name.
func (s *Service) dropFork(ctx context.Context, name string) {
	release := s.names.try(name)
	if release == nil {
		return
	}
	defer release()
	if err := s.host.DeleteSnapshot(ctx, name); err != nil && CodeOf(err) != CodeNotFound {
		s.log.WarnContext(ctx, "remove the snapshot of a fork that was cut off", "name", name, "err", err)
		return
	}
	s.log.InfoContext(ctx, "removed the snapshot of a fork that was cut off", "name", name)
}

// correctTemplate adds or removes one row, unless there has been an operation
// on snapshots since the lists were read; the next look sees to it then.
func (s *Service) correctTemplate(ctx context.Context, seq int64, name string, correct func() error) error {
	release := s.names.try(name)
	if release == nil {
		return nil
	}
	defer release()
	if s.snapshots.Load() != seq {
		return nil
	}
	err := correct()
	if errors.Is(err, ErrExists) || errors.Is(err, ErrNotFound) {
		return nil // Another look was quicker.
	}
	if err != nil {
		return fmt.Errorf("correct template %s: %w", name, err)
	}
	s.log.InfoContext(ctx, "took over the host's view", "template", name)
	return nil
}
