package control

import (
	"context"
	"io"
	"net"
	"time"
)

// Host is one machine that runs sandboxes. NewHost makes one of the generated
// client; controltest has a fake. Errors are *Error; Uncertain is set when the
// outcome is not known. Operations go on when ctx ends: it bounds the wait.
type Host interface {
	Info(ctx context.Context) (HostInfo, error)
	// CreateSandbox answers when the sandbox takes commands.
	CreateSandbox(ctx context.Context, r HostCreate) (HostSandbox, error)
	// DestroySandbox removes one in any state. not_found when there is none.
	DestroySandbox(ctx context.Context, id string) error
	// PauseSandbox answers when the state is durable. A failed one leaves the
	// sandbox running.
	PauseSandbox(ctx context.Context, id string) (HostSandbox, error)
	// ResumeSandbox: a failed one leaves the sandbox paused. With reboot it
	// starts from the paused disk alone; the memory is not used.
	ResumeSandbox(ctx context.Context, id string, reboot bool) (HostSandbox, error)
	// SetEgress replaces what the guest may reach, now and in later runs; nil
	// is the default.
	SetEgress(ctx context.Context, id string, e *Egress) error
	// ListSandboxes gives all, running or paused.
	ListSandboxes(ctx context.Context) ([]HostSandbox, error)
	// WatchSandboxes calls changed for every report until ctx ends or the
	// stream breaks; it never returns nil.
	WatchSandboxes(ctx context.Context, changed func(HostEvent)) error

	CreateSnapshot(ctx context.Context, sandboxID, name string, replace bool) (Template, error)
	DeleteSnapshot(ctx context.Context, name string) error
	// ListSnapshots gives base templates and snapshots.
	ListSnapshots(ctx context.Context) ([]Template, error)
	// CollectGarbage frees what nothing needs, or tells what it would free;
	// invalid_state while an operation of the host is in the way.
	CollectGarbage(ctx context.Context, dryRun bool) (Garbage, error)

	Exec(ctx context.Context, id string, r ExecRequest) (ExecResult, error)
	// ExecStream starts a command; the first event is EventStart.
	ExecStream(ctx context.Context, id string, r ExecRequest) (ExecStream, error)

	// ReadFile gives the entry at once and the content as a stream.
	ReadFile(ctx context.Context, id string, f FileRef) (FileEntry, io.ReadCloser, error)
	// WriteFile creates or replaces a file by what r gives. An error of r
	// leaves the file as it was and is returned wrapped.
	WriteFile(ctx context.Context, id string, f FileRef, mode uint32, r io.Reader) (FileEntry, error)
	ListFiles(ctx context.Context, id string, f FileRef, depth uint32) ([]FileEntry, error)
	MakeDir(ctx context.Context, id string, f FileRef) (FileEntry, error)
	RemoveFile(ctx context.Context, id string, f FileRef) error

	Metrics(ctx context.Context, id string) (Metrics, error)

	// AccessToken is what the sandbox's guest agent asks of its callers; it
	// never changes.
	AccessToken(ctx context.Context, id string) (string, error)
	// Dial connects to a TCP port of a running sandbox; ctx bounds the wait
	// only. A closed port is an error that wraps ErrPortClosed.
	Dial(ctx context.Context, id string, port int) (net.Conn, error)
}

// HostInfo is what a host is and can do.
type HostInfo struct {
	Driver, DriverVersion string
	// Accelerator is "kvm" or "tcg".
	Accelerator                 string
	MemoryTotalMB, MemoryFreeMB uint64
	CPUs                        uint32
	Version                     string
}

// HostState is what a host says of a sandbox.
type HostState uint8

// Host states. Moving is any state in which the host is at work on it.
const (
	HostMoving HostState = iota
	HostRunning
	HostPaused
	HostError
)

// HostSandbox is a sandbox as its host reports it.
type HostSandbox struct {
	ID              string
	State           HostState
	Template        string
	VCPUs, MemoryMB int
	Error           string
	CreatedAt       time.Time
	StartedAt       time.Time
	// Annotations are the bytes given in HostCreate.
	Annotations []byte
	// Waiting says why it stands still although it runs; else empty.
	Waiting string
}

// HostEvent is one report of WatchSandboxes.
type HostEvent struct {
	Sandbox HostSandbox
	Removed bool
	Synced  bool
}

// HostCreate asks for a sandbox. VCPUs and MemoryMB are never 0.
type HostCreate struct {
	ID, Template    string
	VCPUs, MemoryMB int
	Envs            map[string]string
	Annotations     []byte
	// Egress nil is the default.
	Egress *Egress
}

// PtySize is the size of a terminal in characters.
type PtySize struct{ Cols, Rows uint32 }

// ExecRequest is one command; it is run directly, without a shell. TimeoutSec 0
// leaves only MaxExecSec. Stdin is for Exec, Pty for ExecStream.
type ExecRequest struct {
	Cmd        string
	Args       []string
	Envs       map[string]string
	Cwd        string
	User       string
	TimeoutSec int64
	Stdin      []byte
	Pty        *PtySize
	// AttachPID, not 0, is a process that runs, whose output ExecStream goes on
	// with instead of starting one; all else but TimeoutSec is empty then.
	AttachPID uint32
}

// ExecResult is what a finished command left.
type ExecResult struct {
	Stdout, Stderr []byte
	ExitCode       int32
	Duration       time.Duration
	// TimedOut: the time limit ended it.
	TimedOut bool
}

// ExecStream is a running command. One goroutine may send while another
// receives.
type ExecStream interface {
	Send(ExecInput) error
	// Recv gives the next event; the last one is EventExit, then io.EOF.
	Recv() (ExecEvent, error)
	// Close frees the stream; the command is not touched.
	Close() error
}

// ExecInput is one message to a command; the fields exclude each other.
type ExecInput struct {
	Stdin      []byte
	CloseStdin bool
	// Stop: SIGTERM, then SIGKILL.
	Stop   bool
	Resize *PtySize
}

// EventKind says what an ExecEvent holds.
type EventKind uint8

// The kinds of events.
const (
	EventStart EventKind = iota + 1
	EventStdout
	EventStderr
	EventPty
	EventExit
)

// ExecEvent is one message of a command: PID for start, Data for output,
// ExitCode and Reason (how it ended where not by exiting) for exit.
type ExecEvent struct {
	Kind     EventKind
	PID      uint32
	Data     []byte
	ExitCode int32
	Reason   string
}

// FileRef names a file of a sandbox. A relative path starts at the user's home;
// an empty User is the sandbox's default user.
type FileRef struct{ Path, User string }

// FileEntry describes a file.
type FileEntry struct {
	Name, Path string
	// Type is "file", "dir", "symlink" or "other".
	Type          string
	Size          uint64
	Mode          uint32
	Owner, Group  string
	ModifiedAt    time.Time
	SymlinkTarget string
}

// Metrics are figures of one sandbox; sizes are bytes.
type Metrics struct {
	At       time.Time
	CPUCount uint32
	// CPUUsedPct is percent of one CPU; up to 100 × CPUCount.
	CPUUsedPct                  float64
	MemTotal, MemUsed, MemCache uint64
	DiskTotal, DiskUsed         uint64
	// PrivateMemory is the memory of the host that only this sandbox uses.
	PrivateMemory uint64
	Faults        uint64
}
