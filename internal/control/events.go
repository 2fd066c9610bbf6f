package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/logctx"
)

// EventType says what an event is about.
type EventType string

// The types. A failed operation has the type of the operation, and an error.
const (
	EventCreate   EventType = "create"
	EventPause    EventType = "pause"
	EventResume   EventType = "resume"
	EventSnapshot EventType = "snapshot"
	EventFork     EventType = "fork"
	EventDelete   EventType = "delete"
	// EventTimeout: the time limit was changed. EventExpire: it was reached.
	EventTimeout EventType = "timeout"
	EventExpire  EventType = "expire"
	// EventFound: the host was found to differ from what was known, and its
	// word was taken. EventAdopt: the host had it and the database did not.
	EventFound EventType = "found"
	EventAdopt EventType = "adopt"
	// EventWait: it stands still although it runs, as on a full disk of the
	// host; the error says why. EventGoOn: it does not any more.
	EventWait EventType = "wait"
	EventGoOn EventType = "go_on"
)

// MaxEvents bounds what is kept of one sandbox; the oldest go first.
const MaxEvents = 500

// Event is one line of a sandbox's log. Seq counts up from 1 within a sandbox.
type Event struct {
	SandboxID string
	Seq       int64
	At        time.Time
	Type      EventType
	// Status of the sandbox after it.
	Status    Status
	Duration  time.Duration
	Detail    string
	Error     string
	RequestID string
}

// WithRequestID marks what is done under ctx with the ID of the request that
// asked for it. Logs and events show it.
func WithRequestID(ctx context.Context, id string) context.Context {
	return logctx.WithRequest(ctx, id)
}

// RequestID gives the ID of the request that ctx belongs to, or nothing.
func RequestID(ctx context.Context) string {
	return logctx.Request(ctx)
}

// Events reads a sandbox's log from after seq on, oldest first. The log of a
// deleted sandbox can be read as long as it is kept in the history.
func (s *Service) Events(ctx context.Context, id string, after int64, limit int) ([]Event, error) {
	if err := ValidateID("id", id); err != nil {
		return nil, err
	}
	if _, err := s.store.GetSandbox(ctx, id); errors.Is(err, ErrNotFound) {
		return nil, noSandbox(id)
	} else if err != nil {
		return nil, fmt.Errorf("read sandbox %s: %w", id, err)
	}
	list, err := s.store.ListEvents(ctx, id, after, limit)
	if err != nil {
		return nil, fmt.Errorf("read the events of %s: %w", id, err)
	}
	return list, nil
}

// note writes an event. The operation that it tells of has happened, so an
// event that cannot be written is logged and no more. The row's present state
// is the event's unless it has one.
func (s *Service) note(ctx context.Context, e Event) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noteTimeout)
	defer cancel()
	e.At, e.RequestID = s.now(), RequestID(ctx)
	if e.Status == "" {
		sb, err := s.store.GetSandbox(ctx, e.SandboxID)
		if err != nil {
			return // the row has gone, and its log with it
		}
		e.Status = sb.Status
	}
	if err := s.store.AddEvent(ctx, e); err != nil {
		s.log.WarnContext(ctx, "write an event", "sandbox", e.SandboxID, "type", e.Type, "err", err)
	}
}

// noteTimeout bounds the wait for a database that is busy.
const noteTimeout = 5 * time.Second

// noted is note for the end of an operation: defer s.noted(ctx, id, type)(&err).
// Being refused before anything was done is no event.
func (s *Service) noted(ctx context.Context, id string, t EventType, detail string) func(*error) {
	start := s.clock.Mono()
	return func(err *error) {
		took := s.clock.Mono() - start
		if *err == nil {
			s.log.InfoContext(ctx, "operation", "operation", t, "sandbox", id, "took", took)
		} else {
			s.log.WarnContext(ctx, "operation failed", "operation", t, "sandbox", id, "took", took, "err", *err)
		}
		e := Event{SandboxID: id, Type: t, Detail: detail, Duration: took}
		if *err != nil {
			e.Error = reasonOf(*err)
		}
		s.note(ctx, e)
	}
}
