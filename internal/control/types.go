package control

import (
	"maps"
	"time"
)

// Sandbox is one sandbox as the control plane knows it. Zero times are not
// known or do not apply. Times are UTC with microseconds.
type Sandbox struct {
	ID       string
	Template string
	Status   Status
	VCPUs    int
	MemoryMB int
	Metadata map[string]string
	// TimeoutSec is the length of one run in seconds; 0 is no limit.
	TimeoutSec int64
	// AutoPause pauses instead of deleting when the limit is reached.
	AutoPause bool
	CreatedAt time.Time
	// StartedAt is when the present run began.
	StartedAt time.Time
	// LastActiveAt is when a command or a file transfer last ended; while one
	// is running, reading gives the present time.
	LastActiveAt time.Time
	// ExpiresAt is when the present run reaches its limit.
	ExpiresAt time.Time
	// ChangedAt is when the row was last written, but for LastActiveAt.
	ChangedAt time.Time
	// Error says why Status is error.
	Error string
	// Options are what other surfaces than our own may ask for.
	Options SandboxOptions
	// Version counts changes of the row; the compare-and-set compares it.
	Version int64
}

func (s Sandbox) clone() Sandbox {
	s.Metadata = maps.Clone(s.Metadata)
	s.Options = s.Options.clone()
	return s
}

// Template kinds.
const (
	TemplateBase     = "base"
	TemplateSnapshot = "snapshot"
)

// Template is what a sandbox can be created from: a base image or a named
// snapshot. The names share one space.
type Template struct {
	Name string
	// Type is TemplateBase or TemplateSnapshot.
	Type string
	// VCPUs and MemoryMB are fixed by a snapshot; in a base they are what a
	// sandbox gets that asks for nothing else.
	VCPUs    int
	MemoryMB int
	// SizeBytes is what this generation added to the store.
	SizeBytes  int64
	Generation int64
	// SourceID is the sandbox that was frozen, where the host was asked.
	SourceID string
	// Parent is the template its source was created from.
	Parent    string
	CreatedAt time.Time
}

// APIKey is a stored key. The key itself is never stored.
type APIKey struct {
	ID   string
	Name string
	// Prefix is the beginning of the key, for people to tell keys apart.
	Prefix string
	// Hash is the SHA-256 of the whole key in lower-case hex.
	Hash      string
	CreatedAt time.Time
}

// CreateParams are what a caller chooses about a new sandbox. VCPUs and
// MemoryMB nil: the template's own values.
type CreateParams struct {
	// ID is one of NewID; empty makes one.
	ID         string
	Template   string
	VCPUs      *int64
	MemoryMB   *int64
	TimeoutSec int64
	AutoPause  bool
	Metadata   map[string]string
	Envs       map[string]string
	Options    SandboxOptions
}

// Cursor is a place in the list of sandboxes, newest first: the last one seen.
type Cursor struct {
	CreatedAt time.Time
	ID        string
}

// SandboxFilter selects sandboxes. Empty fields select all; stopped ones only
// when Statuses names that status. All Metadata pairs must match.
type SandboxFilter struct {
	Statuses []Status
	Metadata map[string]string
	After    Cursor
	// Limit is the greatest number of rows; 0 is no limit.
	Limit int
}

// TemplateFilter selects templates, in order of name. Limit 0 is no limit.
type TemplateFilter struct {
	Type  string
	After string
	Limit int
}
