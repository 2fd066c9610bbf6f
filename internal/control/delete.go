package control

import (
	"context"
	"fmt"
	"time"
)

// Delete removes a sandbox in any state. It takes the status at once and waits
// for the operation under way, if any, before it asks the host.
func (s *Service) Delete(ctx context.Context, id string) error {
	return s.remove(ctx, id, nil)
}

// remove is Delete if the row also meets cond.
func (s *Service) remove(ctx context.Context, id string, cond func(Sandbox) error) (err error) {
	ctx, cancel := s.detach(WithReserve(ctx))
	defer cancel()
	if _, err := s.row(ctx, id); err != nil {
		return err
	}
	done := s.deleting.try(id)
	if done == nil {
		return errorf(CodeInvalidState, "sandbox %s is being deleted already", id)
	}
	defer done()
	_, err = s.mutate(ctx, id, CanMove, func(r *Sandbox) error {
		if cond != nil {
			if err := cond(*r); err != nil {
				return err
			}
		}
		r.Status = StatusStopping
		r.ExpiresAt = time.Time{}
		return nil
	})
	if err != nil {
		return err
	}
	defer s.observe("delete")(&err)
	defer s.noted(ctx, id, EventDelete, "")(&err)
	return s.finishDelete(ctx, id)
}

// finishDelete removes a stopping sandbox from the host. The caller holds the
// lock in deleting. A host that does not answer leaves it stopping: the
// reconciler asks again. A host that refuses makes it an error, which can be
// deleted again.
func (s *Service) finishDelete(ctx context.Context, id string) error {
	release, err := s.ops.take(ctx, id)
	if err != nil {
		return errorf(CodeHostUnavailable, "sandbox %s is still busy; it will be removed when that ends", id)
	}
	defer release()
	to, reason := StatusStopped, ""
	hostErr := s.host.DestroySandbox(ctx, id)
	switch {
	case hostErr == nil, CodeOf(hostErr) == CodeNotFound:
		hostErr = nil
	case isUncertain(hostErr), CodeOf(hostErr) == CodeHostUnavailable:
		s.wake()
		return &Error{Code: CodeHostUnavailable, Err: hostErr,
			Message: fmt.Sprintf("the host does not answer; sandbox %s will be removed when it does", id)}
	default:
		to, reason = StatusError, "the host could not remove it: "+reasonOf(hostErr)
	}
	ctx, cancel := s.detach(ctx)
	defer cancel()
	_, err = s.mutate(ctx, id, CanMove, func(r *Sandbox) error {
		if r.Status != StatusStopping {
			return wrongState(*r, "delete", "stopping")
		}
		r.Status, r.Error = to, reason
		r.StartedAt, r.ExpiresAt = time.Time{}, time.Time{}
		return nil
	})
	if hostErr != nil {
		return fmt.Errorf("delete %s: %w", id, hostErr)
	}
	return err
}
