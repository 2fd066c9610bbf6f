package client

import (
	"regexp"
	"strings"
	"time"
)

// States of a sandbox.
const (
	StatusPending  = "pending"
	StatusRunning  = "running"
	StatusPausing  = "pausing"
	StatusPaused   = "paused"
	StatusResuming = "resuming"
	StatusStopping = "stopping"
	StatusStopped  = "stopped"
	StatusError    = "error"
)

// Sandbox is one sandbox as the server sees it. Times that are not known are
// zero and absent from JSON.
type Sandbox struct {
	ID       string `json:"id"`
	Template string `json:"template"`
	// Status is one of the Status constants.
	Status   string            `json:"status"`
	VCPUs    int               `json:"vcpus"`
	MemoryMB int               `json:"memory_mb"`
	Metadata map[string]string `json:"metadata"`
	// TimeoutSec is how long it may run without being extended, in seconds; 0
	// means without limit.
	TimeoutSec int `json:"timeout_sec"`
	// AutoPause says that reaching the limit pauses it instead of destroying it.
	AutoPause    bool      `json:"auto_pause"`
	CreatedAt    time.Time `json:"created_at,omitzero"`
	StartedAt    time.Time `json:"started_at,omitzero"`
	LastActiveAt time.Time `json:"last_active_at,omitzero"`
	ExpiresAt    time.Time `json:"expires_at,omitzero"`
	// Error says why Status is error.
	Error string `json:"error,omitempty"`
}

// Snapshot is a template: a base, or a sandbox frozen under a name.
type Snapshot struct {
	Name string `json:"name"`
	// Type is "base" or "snapshot".
	Type string `json:"type"`
	// VCPUs and MemoryMB are fixed by a snapshot; 0 in a base, which fixes nothing.
	VCPUs    int `json:"vcpus"`
	MemoryMB int `json:"memory_mb"`
	// SizeBytes is what this generation added to the store.
	SizeBytes int64 `json:"size_bytes"`
	// Generation counts the pauses and snapshots between it and its origin.
	Generation int64 `json:"generation"`
	// Parent is the template that the frozen sandbox was created from.
	Parent    string    `json:"parent,omitempty"`
	CreatedAt time.Time `json:"created_at,omitzero"`
}

// Types of a Snapshot.
const (
	SnapshotTypeBase     = "base"
	SnapshotTypeSnapshot = "snapshot"
)

var (
	idPattern   = regexp.MustCompile(`^[a-z0-9]{1,64}$`)
	namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	tagPattern  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
)

// checkID refuses what cannot be a sandbox ID, the empty string above all:
// "DELETE /v1/sandboxes/" must never be sent.
func checkID(id string) error {
	if !idPattern.MatchString(id) {
		return invalid("sandbox id %.80q: must be lower-case letters and digits", id)
	}
	return nil
}

// checkTemplate takes a name, and a built template's with a tag.
func checkTemplate(template string) error {
	name, tag, tagged := strings.Cut(template, ":")
	if tagged && !tagPattern.MatchString(tag) {
		return invalid("template %.80q: the tag after the colon must be 1 to 63 letters, digits, dots, underscores and hyphens", template)
	}
	return checkName(name)
}

func checkName(name string) error {
	if !namePattern.MatchString(name) {
		return invalid("snapshot name %.80q: must be 1 to 63 of a-z 0-9 . _ - and begin with a letter or digit", name)
	}
	return nil
}
