package control

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// ConnectParams say how Connect leaves a sandbox.
type ConnectParams struct {
	// TimeoutSec is how long it runs from now at least.
	TimeoutSec int64
	// Reboot starts a paused one from its disk alone.
	Reboot bool
}

// Connect makes a sandbox run for at least so long: a running one keeps its
// limit where that is later, a paused one is resumed. It waits for an
// operation that is under way.
func (s *Service) Connect(ctx context.Context, id string, p ConnectParams) (_ Sandbox, resumed bool, err error) {
	if err := validateTimeout(p.TimeoutSec); err != nil {
		return Sandbox{}, false, err
	}
	for {
		sb, err := s.settled(ctx, id)
		if err != nil {
			return sb, false, err
		}
		switch sb.Status {
		case StatusRunning:
			sb, err = s.deadline(ctx, id, p.TimeoutSec, true)
			if CodeOf(err) == CodeInvalidState {
				continue // it was paused or deleted at this moment
			}
			return sb, false, err
		case StatusPaused:
			sb, err = s.resume(ctx, id, p)
			if CodeOf(err) == CodeInvalidState && s.moved(ctx, id, StatusPaused) {
				continue // somebody else resumed it
			}
			return sb, err == nil, err
		default:
			return sb, false, wrongState(sb, "connect", "running or paused")
		}
	}
}

func (s *Service) moved(ctx context.Context, id string, from Status) bool {
	sb, err := s.row(ctx, id)
	return err != nil || sb.Status != from || s.ops.busy(id)
}

// settled reads a sandbox when no operation on it is under way.
func (s *Service) settled(ctx context.Context, id string) (Sandbox, error) {
	sb, err := s.row(ctx, id)
	if err != nil {
		return sb, err
	}
	release, err := s.ops.take(ctx, id)
	if err != nil {
		return sb, err
	}
	release()
	return s.row(ctx, id)
}

func (s *Service) resume(ctx context.Context, id string, p ConnectParams) (Sandbox, error) {
	return s.change(ctx, id, step{
		op: "resume", from: StatusPaused, orFrom: StatusError, by: StatusResuming,
		do: func(ctx context.Context, id string) (HostSandbox, error) {
			r, err := s.row(ctx, id)
			if err != nil {
				return HostSandbox{}, err
			}
			return s.host.ResumeSandbox(ctx, id, p.Reboot || r.Options.DiskOnly)
		},
		done: func(r *Sandbox, hs HostSandbox) {
			if p.TimeoutSec != 0 {
				r.TimeoutSec = p.TimeoutSec
			}
			r.Options.DiskOnly = false
			s.begin(r, hs)
		},
	})
}

// SetDeadline lets the present run end in sec seconds, sooner or later than it
// would; 0 is now.
func (s *Service) SetDeadline(ctx context.Context, id string, sec int64) (Sandbox, error) {
	if err := validateTimeout(sec); err != nil {
		return Sandbox{}, err
	}
	return s.deadline(ctx, id, sec, false)
}

// deadline moves the end of the present run; with grow only to a later time.
func (s *Service) deadline(ctx context.Context, id string, sec int64, grow bool) (Sandbox, error) {
	sb, err := s.row(ctx, id)
	if err != nil {
		return sb, err
	}
	length := time.Duration(sec) * time.Second
	at := s.now().Add(length)
	later := func(r Sandbox) bool { return !r.ExpiresAt.IsZero() && length > s.deadlines.left(r) }
	if grow && sb.Status == StatusRunning && !later(sb) {
		return s.seen(sb), nil // not even the version changes
	}
	sb, err = s.mutate(ctx, id, CanMove, func(r *Sandbox) error {
		if r.Status != StatusRunning {
			return wrongState(*r, "timeout", string(StatusRunning))
		}
		if !grow || later(*r) {
			r.ExpiresAt = at
			r.TimeoutSec = max(sec, 1)
		}
		return nil
	})
	return s.seen(sb), err
}

// PauseDisk is Pause that keeps the disk alone: the next resume boots from it.
func (s *Service) PauseDisk(ctx context.Context, id string) (Sandbox, error) {
	return s.pauseAs(ctx, id, true, nil)
}

// PauseSettled is Pause, or PauseDisk, that waits for an operation under way.
func (s *Service) PauseSettled(ctx context.Context, id string, diskOnly bool) (Sandbox, error) {
	for {
		sb, err := s.settled(ctx, id)
		if err != nil {
			return sb, err
		}
		sb, err = s.pauseAs(ctx, id, diskOnly, nil)
		if CodeOf(err) == CodeInvalidState && s.ops.busy(id) {
			continue // another one was quicker
		}
		return sb, err
	}
}

// SetEgress replaces what a sandbox's guest may reach, at once.
func (s *Service) SetEgress(ctx context.Context, id string, e *Egress) (Sandbox, error) {
	if err := e.validate(); err != nil {
		return Sandbox{}, err
	}
	ctx, cancel := s.detach(ctx)
	defer cancel()
	sb, release, err := s.hold(ctx, id, "network")
	if err != nil {
		return sb, err
	}
	defer release()
	if err := s.host.SetEgress(ctx, id, e); err != nil {
		return sb, err
	}
	return s.mutate(ctx, id, CanMove, func(r *Sandbox) error {
		r.Options.Egress = e.clone()
		return nil
	})
}

// SnapshotsOf lists the named snapshots, of one sandbox or, where sandboxID is
// empty, of all. The host is asked: it knows what each was made of.
func (s *Service) SnapshotsOf(ctx context.Context, sandboxID string) ([]Template, error) {
	list, err := s.host.ListSnapshots(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the host's snapshots: %w", err)
	}
	return slices.DeleteFunc(list, func(t Template) bool {
		return t.Type != TemplateSnapshot || (sandboxID != "" && t.SourceID != sandboxID) || strings.HasPrefix(t.Name, forkPrefix)
	}), nil
}
