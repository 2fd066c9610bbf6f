package control

import (
	"context"
	"time"
)

// Store keeps the control plane's rows. Methods are safe for concurrent use
// and durable when they return. They answer ErrNotFound, ErrExists and ErrStale
// (wrapped or not) where said; other errors are faults of the database.
type Store interface {
	// Ping tells whether the database answers.
	Ping(ctx context.Context) error
	// CheckWritable tells whether rows can be written now. It changes none.
	CheckWritable(ctx context.Context) error

	// CreateSandbox inserts s with version 1. ErrExists when the ID is taken,
	// also by a stopped one.
	CreateSandbox(ctx context.Context, s Sandbox) error
	// GetSandbox reads one in any state. ErrNotFound.
	GetSandbox(ctx context.Context, id string) (Sandbox, error)
	// ListSandboxes gives newest first (created_at, then ID, descending).
	ListSandboxes(ctx context.Context, f SandboxFilter) ([]Sandbox, error)
	// UpdateSandbox writes s if the row still has s.Version, and counts the
	// version up. ID, template, size, metadata and created_at never change;
	// last_active_at only moves forward. ErrStale, also when the row is gone.
	UpdateSandbox(ctx context.Context, s Sandbox) error
	// TouchSandbox moves last_active_at forward to at; the version stays. It
	// is no error when the row is gone.
	TouchSandbox(ctx context.Context, id string, at time.Time) error
	// DeleteSandbox removes the row if it still has this version. ErrStale.
	DeleteSandbox(ctx context.Context, id string, version int64) error
	// PruneStopped removes stopped rows last changed before t.
	PruneStopped(ctx context.Context, t time.Time) (int64, error)
	// CountSandboxes counts rows by status; statuses without rows are left out.
	CountSandboxes(ctx context.Context) (map[Status]int, error)

	// AddEvent numbers e and appends it to its sandbox's log, which keeps the
	// newest MaxEvents. ErrNotFound when the sandbox has no row; the log goes
	// with the row.
	AddEvent(ctx context.Context, e Event) error
	// ListEvents gives those after seq, oldest first, at most limit.
	ListEvents(ctx context.Context, sandboxID string, after int64, limit int) ([]Event, error)
	// ListWaits gives, of each sandbox that stands still by its log, the newest
	// EventWait: no EventGoOn comes after it.
	ListWaits(ctx context.Context) ([]Event, error)

	// ClaimAnswer keeps a for a request that may be sent again. When there is
	// one of the same scope and name already, it gives that and ErrExists.
	ClaimAnswer(ctx context.Context, a Answer) (Answer, error)
	// FinishAnswer writes what a claimed one was answered with.
	FinishAnswer(ctx context.Context, a Answer) error
	// DropAnswer takes a claim back.
	DropAnswer(ctx context.Context, scope, name string) error
	// PruneAnswers removes those made before t.
	PruneAnswers(ctx context.Context, t time.Time) (int64, error)

	// CreateTemplate inserts t. ErrExists when the name is taken.
	CreateTemplate(ctx context.Context, t Template) error
	// PutTemplate inserts t, or writes it in place of the one of its name.
	PutTemplate(ctx context.Context, t Template) error
	// GetTemplate reads one. ErrNotFound.
	GetTemplate(ctx context.Context, name string) (Template, error)
	// ListTemplates gives them in order of name.
	ListTemplates(ctx context.Context, f TemplateFilter) ([]Template, error)
	// DeleteTemplate removes one. ErrNotFound.
	DeleteTemplate(ctx context.Context, name string) error

	// CreateAPIKey inserts k. ErrExists when the hash is there.
	CreateAPIKey(ctx context.Context, k APIKey) error
	// GetAPIKeyByHash finds a key. ErrNotFound.
	GetAPIKeyByHash(ctx context.Context, hash string) (APIKey, error)
	// ListAPIKeys gives all, oldest first.
	ListAPIKeys(ctx context.Context) ([]APIKey, error)
	// DeleteAPIKey removes one by ID. ErrNotFound.
	DeleteAPIKey(ctx context.Context, id string) error
}
