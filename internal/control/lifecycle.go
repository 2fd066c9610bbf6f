package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// annotations are kept by the host beside the sandbox, so that a lost database
// can be made again.
type annotations struct {
	Template   string            `json:"template"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	TimeoutSec int64             `json:"timeout_sec,omitempty"`
	AutoPause  bool              `json:"auto_pause,omitempty"`
	CreatedAt  time.Time         `json:"created_at"`
	Options    SandboxOptions    `json:"options,omitzero"`
}

// Create makes a sandbox and answers when it takes commands. One that cannot be
// made leaves nothing.
func (s *Service) Create(ctx context.Context, p CreateParams) (_ Sandbox, err error) {
	if err := p.validate(); err != nil {
		return Sandbox{}, err
	}
	t, err := s.template(ctx, p.Template)
	if err != nil {
		return Sandbox{}, err
	}
	sb, err := plan(p, t)
	if err != nil {
		return Sandbox{}, err
	}
	defer s.observe("create")(&err)
	return s.create(ctx, sb, t.Name, p.Envs)
}

// template finds what to create from; one that the database does not know yet
// may be on the host.
func (s *Service) template(ctx context.Context, name string) (Template, error) {
	name, err := s.resolve(ctx, name)
	if err != nil {
		return Template{}, err
	}
	t, err := s.store.GetTemplate(ctx, name)
	if errors.Is(err, ErrNotFound) {
		list, err := s.reconcileTemplates(ctx)
		if err != nil {
			return t, err
		}
		for _, t := range list {
			if t.Name == name {
				return t, nil
			}
		}
		return t, errorf(CodeNotFound, "template: there is no template or snapshot %q; GET /v1/snapshots lists them", name)
	}
	if err != nil {
		return t, fmt.Errorf("read template %s: %w", name, err)
	}
	return t, nil
}

// resolve gives the snapshot of a built template's name and tag. A template's or
// snapshot's own name comes first, and stands also with the usual tags.
func (s *Service) resolve(ctx context.Context, name string) (string, error) {
	base, tag, tagged := strings.Cut(name, ":")
	if !tagged {
		tag = "default"
	}
	usual := tag == "default" || tag == "latest"
	if s.opt.Resolve == nil && usual {
		return base, nil
	}
	if usual {
		_, err := s.store.GetTemplate(ctx, base)
		if err == nil {
			return base, nil
		}
		if !errors.Is(err, ErrNotFound) {
			return "", fmt.Errorf("read template %s: %w", base, err)
		}
	}
	if s.opt.Resolve != nil {
		snapshot, err := s.opt.Resolve(ctx, base, tag)
		if err == nil {
			return snapshot, nil
		}
		if !errors.Is(err, ErrNotFound) {
			return "", fmt.Errorf("resolve template %s: %w", name, err)
		}
	}
	if usual {
		return base, nil // the host may have it
	}
	return "", errorf(CodeNotFound, "template: there is no template %q", name)
}

// plan decides the row of a new sandbox.
func plan(p CreateParams, t Template) (Sandbox, error) {
	sb := Sandbox{
		ID: p.ID, Template: t.Name, Status: StatusPending,
		VCPUs: t.VCPUs, MemoryMB: t.MemoryMB,
		Metadata: p.Metadata, TimeoutSec: p.TimeoutSec, AutoPause: p.AutoPause,
		Options: p.Options, Version: 1,
	}
	if sb.ID == "" {
		sb.ID = newID()
	}
	if name, _, _ := strings.Cut(p.Template, ":"); name != t.Name {
		sb.Options.Alias = name
	}
	if t.Type != TemplateSnapshot {
		if p.VCPUs != nil {
			sb.VCPUs = int(*p.VCPUs)
		}
		if p.MemoryMB != nil {
			sb.MemoryMB = int(*p.MemoryMB)
		}
		return sb, nil
	}
	fixed := func(field string, want *int64, have int) error {
		if want == nil || *want == int64(have) {
			return nil
		}
		return Invalid(field, "snapshot %s fixes vcpus to %d and memory_mb to %d; leave them out or give these values", t.Name, t.VCPUs, t.MemoryMB)
	}
	return sb, errors.Join(fixed("vcpus", p.VCPUs, t.VCPUs), fixed("memory_mb", p.MemoryMB, t.MemoryMB))
}

// create makes the sandbox of a planned row from the template source, which
// may differ from the one shown in the row (fork).
func (s *Service) create(ctx context.Context, sb Sandbox, source string, envs map[string]string) (_ Sandbox, err error) {
	ctx, cancel := s.detach(ctx)
	defer cancel()
	release, err := s.ops.take(ctx, sb.ID)
	if err != nil {
		return Sandbox{}, err
	}
	defer release()
	sb.CreatedAt = s.now()
	sb.ChangedAt = sb.CreatedAt
	note, err := json.Marshal(annotations{
		Template: sb.Template, Metadata: sb.Metadata, TimeoutSec: sb.TimeoutSec,
		AutoPause: sb.AutoPause, CreatedAt: sb.CreatedAt, Options: sb.Options,
	})
	if err != nil {
		return Sandbox{}, fmt.Errorf("encode annotations: %w", err)
	}
	if err := s.store.CreateSandbox(ctx, sb); err != nil {
		return Sandbox{}, fmt.Errorf("insert sandbox: %w", err)
	}
	defer s.noted(ctx, sb.ID, EventCreate, "from "+source)(&err)
	hs, err := s.host.CreateSandbox(ctx, HostCreate{
		ID: sb.ID, Template: source, VCPUs: sb.VCPUs, MemoryMB: sb.MemoryMB,
		Envs: envs, Annotations: note, Egress: sb.Options.Egress,
	})
	if err != nil {
		s.unmake(ctx, sb.ID, err)
		return Sandbox{}, fmt.Errorf("create sandbox on the host: %w", err)
	}
	return s.mutate(ctx, sb.ID, CanMove, func(r *Sandbox) error {
		if r.Status != StatusPending {
			return errorf(CodeInvalidState, "sandbox %s was deleted while it was being made", r.ID)
		}
		s.begin(r, hs)
		return nil
	})
}

// begin marks a row as running from now.
func (s *Service) begin(r *Sandbox, hs HostSandbox) {
	now := s.now()
	r.Status, r.Error = StatusRunning, ""
	r.StartedAt = stamp(hs.StartedAt)
	if r.StartedAt.IsZero() {
		r.StartedAt = now
	}
	r.LastActiveAt = now
	r.ExpiresAt = expiry(now, r.TimeoutSec)
}

func expiry(from time.Time, sec int64) time.Time {
	if sec == 0 {
		return time.Time{}
	}
	return from.Add(time.Duration(sec) * time.Second)
}

// unmake removes what a failed create may have left. The caller holds the lock.
// What cannot be removed now stays in stopping, for the reconciler.
func (s *Service) unmake(ctx context.Context, id string, cause error) {
	s.log.WarnContext(ctx, "create failed", "sandbox", id, "err", cause)
	// The create's own deadline may be over.
	ctx, cancel := s.detach(ctx)
	defer cancel()
	r, err := s.mutate(ctx, id, CanMove, func(r *Sandbox) error {
		r.Status = StatusStopping
		return nil
	})
	if err != nil {
		return // A delete got there first and does the rest.
	}
	if err := s.host.DestroySandbox(ctx, id); err != nil && CodeOf(err) != CodeNotFound {
		s.log.WarnContext(ctx, "remove what a failed create left", "sandbox", id, "err", err)
		s.wake()
		return
	}
	if err := s.store.DeleteSandbox(ctx, id, r.Version); err != nil {
		s.log.WarnContext(ctx, "remove the row of a failed create", "sandbox", id, "err", err)
		s.wake()
	}
}

// Pause writes the sandbox's whole state to disk and frees its memory.
func (s *Service) Pause(ctx context.Context, id string) (Sandbox, error) {
	return s.pauseAs(ctx, id, false, nil)
}

// pauseAs is Pause, or PauseDisk, if the row also meets cond.
func (s *Service) pauseAs(ctx context.Context, id string, diskOnly bool, cond func(Sandbox) error) (Sandbox, error) {
	return s.change(ctx, id, step{
		op: "pause", from: StatusRunning, by: StatusPausing, cond: cond,
		do: s.host.PauseSandbox,
		done: func(r *Sandbox, _ HostSandbox) {
			r.Status, r.Options.DiskOnly = StatusPaused, diskOnly
			r.StartedAt, r.ExpiresAt = time.Time{}, time.Time{}
		},
	})
}

// Resume brings a paused sandbox back; its time limit begins anew. One in error
// that was paused before goes on from there, and what it did since is lost.
func (s *Service) Resume(ctx context.Context, id string) (Sandbox, error) {
	return s.resume(ctx, id, ConnectParams{})
}

// step is a change that goes from one resting state by a moving one to another.
type step struct {
	op       string
	from, by Status
	// orFrom is a second state that it may go from; empty is none.
	orFrom Status
	cond   func(Sandbox) error
	do     func(context.Context, string) (HostSandbox, error)
	done   func(*Sandbox, HostSandbox)
}

// change does a step. When the host refuses, the row goes back to what it was; when
// the outcome is not known, it stays where it is and the reconciler finds out.
func (s *Service) change(ctx context.Context, id string, st step) (_ Sandbox, err error) {
	ctx, cancel := s.detach(ctx)
	defer cancel()
	if _, err := s.row(ctx, id); err != nil {
		return Sandbox{}, err
	}
	release := s.ops.try(id)
	if release == nil {
		return Sandbox{}, busy(id, st.op)
	}
	defer release()
	var was Status
	_, err = s.mutate(ctx, id, CanMove, func(r *Sandbox) error {
		if was = r.Status; was != st.from && (st.orFrom == "" || was != st.orFrom) {
			return wrongState(*r, st.op, string(st.from))
		}
		if st.cond != nil {
			if err := st.cond(*r); err != nil {
				return err
			}
		}
		r.Status = st.by
		return nil
	})
	if err != nil {
		return Sandbox{}, err
	}
	defer s.observe(st.op)(&err)
	defer s.noted(ctx, id, EventType(st.op), "")(&err)
	hs, err := st.do(ctx, id)
	if err != nil {
		s.undo(ctx, id, st, was, err)
		return Sandbox{}, fmt.Errorf("%s %s: %w", st.op, id, err)
	}
	return s.mutate(ctx, id, CanMove, func(r *Sandbox) error {
		if r.Status != st.by {
			return wrongState(*r, st.op, string(st.by)+" until it ends")
		}
		st.done(r, hs)
		return nil
	})
}

func (s *Service) undo(ctx context.Context, id string, st step, was Status, cause error) {
	s.log.WarnContext(ctx, st.op+" failed", "sandbox", id, "err", cause, "uncertain", isUncertain(cause))
	// The host may also have lost it; a look finds that out either way.
	defer s.wake()
	if isUncertain(cause) {
		return
	}
	// The operation's own deadline may be over.
	ctx, cancel := s.detach(ctx)
	defer cancel()
	_, err := s.mutate(ctx, id, CanMove, func(r *Sandbox) error {
		if r.Status != st.by {
			return wrongState(*r, st.op, string(st.by))
		}
		r.Status = was
		return nil
	})
	if err != nil {
		s.log.InfoContext(ctx, "sandbox changed while "+st.op+" failed", "sandbox", id, "err", err)
	}
}

// SetTimeout gives the present run sec more seconds from now; 0 takes the limit
// away. For a paused sandbox it is the length of the next run.
func (s *Service) SetTimeout(ctx context.Context, id string, sec int64) (Sandbox, error) {
	if err := validateTimeout(sec); err != nil {
		return Sandbox{}, err
	}
	sb, err := s.mutate(ctx, id, CanMove, func(r *Sandbox) error {
		switch r.Status {
		case StatusRunning:
			r.ExpiresAt = expiry(s.now(), sec)
		case StatusPaused:
		default:
			return wrongState(*r, "timeout", "running or paused")
		}
		r.TimeoutSec = sec
		return nil
	})
	if err == nil {
		detail := "no limit"
		if sec > 0 {
			detail = fmt.Sprintf("%d s", sec)
		}
		s.note(ctx, Event{SandboxID: id, Type: EventTimeout, Status: sb.Status, Detail: detail})
	}
	return s.seen(sb), err
}
