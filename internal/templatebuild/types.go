package templatebuild

import (
	"context"
	"io"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// Status of a build.
type Status string

// The states of a build, as the SDKs call them.
const (
	Waiting  Status = "waiting"
	Building Status = "building"
	Ready    Status = "ready"
	Failed   Status = "error"
)

// DefaultTag is the tag of a name that is given without one.
const DefaultTag = "default"

// Build is one build of a template.
type Build struct {
	// ID is a UUID.
	ID string
	// Template is the name, which is also the template's ID.
	Template string
	Status   Status
	// Reason says why Status is error; Step is the step's number as the SDKs
	// count (0 is the base, the steps follow, "finalize" is the start command).
	Reason, Step string
	// Tags are what the build gets when it is ready.
	Tags []string
	// Snapshot is the build's result.
	Snapshot string
	// VCPUs and MemoryMB 0: the base's own.
	VCPUs, MemoryMB    int64
	CreatedAt, EndedAt time.Time
	// Log is kept when the build has ended.
	Log []Entry
}

// Tag is a name for a ready build.
type Tag struct {
	Tag, BuildID string
	CreatedAt    time.Time
}

// Store keeps builds and tags. Errors are control's sentinels.
type Store interface {
	CreateBuild(ctx context.Context, b Build) error
	// GetBuild reads one. ErrNotFound.
	GetBuild(ctx context.Context, template, id string) (Build, error)
	// ListBuilds gives those of one template, or of all for "", newest first,
	// without their logs.
	ListBuilds(ctx context.Context, template string) ([]Build, error)
	// StartBuild moves a waiting build to building. ErrExists when another
	// build of its template is building, ErrStale when it is not waiting.
	StartBuild(ctx context.Context, template, id string) error
	// FinishBuild writes how a build ended. Of a ready one the tags are put in
	// the same transaction.
	FinishBuild(ctx context.Context, b Build) error
	// DeleteBuild removes a row and the tags that point at it.
	DeleteBuild(ctx context.Context, template, id string) error
	// PutTags points tags at a build. ErrNotFound when it is not ready.
	PutTags(ctx context.Context, template, buildID string, tags []string, at time.Time) error
	// DeleteTags takes tags away; those that are not there do not matter.
	DeleteTags(ctx context.Context, template string, tags []string) error
	// ListTags gives a template's tags in order of name.
	ListTags(ctx context.Context, template string) ([]Tag, error)
	// ResolveTemplate gives the snapshot that a name's tag stands for.
	// ErrNotFound.
	ResolveTemplate(ctx context.Context, template, tag string) (string, error)
}

// Sandboxes is what a build needs of the control plane.
type Sandboxes interface {
	Create(ctx context.Context, p control.CreateParams) (control.Sandbox, error)
	Delete(ctx context.Context, id string) error
	List(ctx context.Context, f control.SandboxFilter) ([]control.Sandbox, error)
	Exec(ctx context.Context, id string, r control.ExecRequest) (control.ExecResult, error)
	Start(ctx context.Context, id string, r control.ExecRequest) (Command, error)
	// Reboot starts the sandbox again from its disk alone.
	Reboot(ctx context.Context, id string, timeoutSec int64) error
	ReadFile(ctx context.Context, id string, f control.FileRef) (control.FileEntry, io.ReadCloser, error)
	WriteFile(ctx context.Context, id string, f control.FileRef, mode uint32, r io.Reader) (control.FileEntry, error)
	CreateSnapshot(ctx context.Context, sandboxID, name string) (control.Template, error)
	GetSnapshot(ctx context.Context, name string) (control.Template, error)
	DeleteSnapshot(ctx context.Context, name string) error
}

// Command is a running command; control.Session is one.
type Command interface {
	Send(control.ExecInput) error
	Recv() (control.ExecEvent, error)
	Close()
}

// Service gives a control plane as Sandboxes.
func Service(s *control.Service) Sandboxes { return service{s} }

type service struct{ *control.Service }

func (s service) Start(ctx context.Context, id string, r control.ExecRequest) (Command, error) {
	x, err := s.ExecStream(ctx, id, r)
	if err != nil {
		return nil, err
	}
	return x, nil
}

func (s service) Reboot(ctx context.Context, id string, timeoutSec int64) error {
	if _, err := s.PauseDisk(ctx, id); err != nil {
		return err
	}
	_, _, err := s.Connect(ctx, id, control.ConnectParams{TimeoutSec: timeoutSec, Reboot: true})
	return err
}
