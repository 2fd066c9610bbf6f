// Package vmm is the seam between the engine and the programs that run virtual
// machines (QEMU, Firecracker). It holds the interfaces Driver and Machine, the
// data they exchange, and the few helpers that every driver needs. The engine
// and the drivers import it; it imports the standard library and x/sys only.
//
// The life of a machine:
//
//	Boot ────────────▶ running ◀──Continue── stopped ◀──Restore── saved state
//	                     │  ╰─────Pause──────▶  │  ╰──SaveState──▶ (still stopped)
//	                     ╰──────── Kill ────────╯
//	                               ▼
//	                             ended: Done is closed, Err tells why
//
// Invariants that every driver keeps and vmmtest's conformance suite checks:
//
//  1. A machine is a process of its own session. It outlives the process that
//     started it; Adopt takes it over from a Record and nothing else.
//  2. A signal reaches only the process that was started: it is sent through a
//     pidfd whose start time was compared with the Record.
//  3. A call that fails to start a machine leaves no process behind.
//  4. A machine whose SaveState failed is stopped and whole: Continue works.
//  5. Guest RAM is the file in HostArgs.Memory and is no part of the saved
//     state; whoever restores brings the same bytes in a file of the same size.
//     A driver with Capabilities.OwnMemory keeps RAM to itself: its machines
//     are MemorySavers, and a restore brings a server of pages, or all of them
//     in a file.
//  6. Guest time stands still while the machine is stopped, saved or not (but
//     see Capabilities.ClockRuns): its monotonic clock goes on where it was,
//     its wall clock is the guest agent's to step.
//  7. What is saved (State) and what the host supplies again at restore
//     (HostArgs) are different types.
package vmm

import (
	"context"
	"errors"
	"io"
	"os"
	"time"
)

// Accelerators.
const (
	AccelKVM = "kvm"
	AccelTCG = "tcg" // QEMU's own emulation
)

// Info says what a driver found on this host. It is what a manifest records of
// the machine that a snapshot was taken on.
type Info struct {
	// Kind is the driver's name: "qemu", "firecracker", "fake".
	Kind string `json:"kind"`
	// Version of the VMM program, as it names itself.
	Version string `json:"version"`
	// Accel is AccelKVM or AccelTCG.
	Accel       string `json:"accel"`
	MachineType string `json:"machine_type"`
	CPUModel    string `json:"cpu_model"`
	// CPUFlagsDigest tells hosts apart whose CPUs do not look the same to the
	// guest: 64 hex digits, empty where the CPU model alone says everything.
	CPUFlagsDigest string `json:"cpu_flags_digest,omitempty"`
	// TSCKHz is the frequency of the time stamp counter that the guest sees.
	TSCKHz int64 `json:"tsc_khz"`
	// Remarks are findings for people, such as why KVM is not used; they take
	// no part in comparisons.
	Remarks []string `json:"remarks,omitempty"`
}

// Spec is the machine itself, the same at boot and at every restore.
type Spec struct {
	VCPUs    int `json:"vcpus"`     // 1 to MaxVCPUs
	MemoryMB int `json:"memory_mb"` // MiB, MinMemoryMB to MaxMemoryMB
	// MAC of the one network card, "02:77:72:00:00:02". It is required where
	// HostArgs.Tap is given.
	MAC string `json:"mac,omitempty"`
}

// HostArgs is what the host supplies, anew for each process: the same for a
// boot and a restore, and no part of the saved state. Files are borrowed: the
// driver hands duplicates to its process and never closes the caller's.
type HostArgs struct {
	// ID of the sandbox, [a-z0-9]+, used for the process's name and messages.
	ID string
	// Dir exists, belongs to this machine alone, and takes its sockets and
	// logs. Files of an earlier process in it are replaced.
	Dir string
	// Memory is guest RAM: a memfd (or tmpfs file) of exactly MemoryMB MiB,
	// open for reading and writing, mapped shared. Drivers with OwnMemory
	// want none.
	Memory *os.File
	// MemorySocket is where a restore with OwnMemory hands over its
	// userfaultfd: a server of pages listens there, on the file system of Dir.
	MemorySocket string
	// MemoryFile is all of guest memory in a file in RAM, in place of
	// MemorySocket: a restore with OwnMemory maps it privately and shares its
	// pages with others. Nobody writes to it or takes pages out of it while the
	// machine lives.
	MemoryFile string
	// UffdDev is /dev/userfaultfd to inherit, nil for none.
	UffdDev *os.File
	// DiskSocket is the path of an NBD server's unix socket, export name "".
	// Empty: no disk.
	DiskSocket string
	// DiskDevice is the path of a block device, in place of DiskSocket, for
	// drivers with OwnMemory.
	DiskDevice string
	// Tap is the open tap device; nil: no network card.
	Tap *os.File
	// TapName, in the network namespace at the path NetNS, is the tap device
	// in place of Tap for drivers that open it by name. NetNS empty: ours.
	TapName, NetNS string
	// Number tells the machines of this host apart that run at one time: a
	// driver may give each a user of its own by it.
	Number int
	// ConsolePath takes what the guest writes to its serial console, bounded
	// (see Capabilities.ConsoleLimit). Empty: Dir/console.log. An existing
	// file is appended to.
	ConsolePath string
	// Part, if not nil, is told when a part of the start begins, and what it
	// returns is called when that has ended. Parts may overlap.
	Part func(name string) func()
}

// Begin tells Part, if there is one.
func (h HostArgs) Begin(part string) (end func()) {
	if h.Part == nil {
		return func() {}
	}
	return h.Part(part)
}

// BootArgs describe a machine to be started from a kernel.
type BootArgs struct {
	HostArgs
	Spec
	Kernel string // path of a bzImage
	Initrd string // path, or empty
	// Cmdline is the caller's part of the kernel command line. The driver
	// puts its own before it: console, clock and what to do on a panic.
	Cmdline string
}

// State is what a saved machine is, as the manifest describes it, and the
// file that holds its device state.
type State struct {
	Spec
	// Info of the host that saved it, compared before anything is started.
	Info Info
	// File is the path that SaveState's bytes were written to.
	File string
}

// RestoreArgs describe a machine to be restored.
type RestoreArgs struct {
	HostArgs
	State State
	// Attach is called when the process has mapped guest RAM and before it
	// has touched any of it: this is where a pager makes the mapping private
	// and begins to serve its faults. Nil: the file holds all the bytes.
	// An error ends the restore. A driver with OwnMemory calls it while its
	// process gets ready.
	Attach func(ctx context.Context, pid int) error
	// Disk, in place of HostArgs.DiskDevice, brings the disk and tells its
	// device, or none; it is called while the process gets ready. Nil: the disk
	// is there.
	Disk func(ctx context.Context) (device string, err error)
}

// Warmer is a Driver whose process can be started before it is known which
// machine it will be, so that the machine need not wait for it.
type Warmer interface {
	Driver
	// Warm starts a process for the next machine with this HostArgs.NetNS and
	// Number, and ends one that was there for the number. That machine takes it
	// where it fits, and starts its own otherwise.
	Warm(ctx context.Context, netns string, number int) error
	// Cool ends the process that no machine has taken.
	Cool(number int)
	// Close ends all that no machine has taken; Warm starts none any more.
	Close() error
}

// Record is all that is needed to adopt a live machine: the caller keeps it
// in its journal.
type Record struct {
	ID   string `json:"id"`
	Kind string `json:"kind"` // the driver's name
	PID  int    `json:"pid"`
	// StartTime is field 22 of /proc/<pid>/stat: clock ticks since the host
	// booted. With the PID it names a process for good, until the host boots
	// again; then BootID differs.
	StartTime uint64 `json:"start_time"`
	BootID    string `json:"boot_id"`
	// Control is the path of the VMM's control socket.
	Control     string `json:"control,omitempty"`
	ConsolePath string `json:"console_path,omitempty"`
	StderrPath  string `json:"stderr_path,omitempty"`
	// MemoryFD and UffdDevFD are descriptor numbers inside the process; -1
	// where there is none.
	MemoryFD  int  `json:"memory_fd"`
	UffdDevFD int  `json:"uffd_dev_fd"`
	Spec      Spec `json:"spec"`
	Info      Info `json:"info"`
}

// DirtySource says where the pages that a machine changed are found.
type DirtySource string

const (
	// DirtyPrivatePages: after Attach, the anonymous pages of the mapping of
	// guest RAM. After Boot all of RAM is in HostArgs.Memory and what is not a
	// hole was written.
	DirtyPrivatePages DirtySource = "private-pages"
	// DirtyVMM: the VMM keeps a log and writes a differential snapshot.
	DirtyVMM DirtySource = "vmm"
)

// Capabilities are the facts about a driver that the engine plans by.
type Capabilities struct {
	// SharedMemory: several machines can map one Memory file, each privately.
	SharedMemory bool
	// OwnMemory: RAM is the VMM's own. See MemorySaver and MemorySocket; tap
	// and disk are given by name.
	OwnMemory bool
	// RestartOnly: a guest's power-off does not end the machine, only its
	// restart does.
	RestartOnly bool
	// ClockRuns: guest time stands still while the machine is saved, but not
	// while it is stopped.
	ClockRuns   bool
	DirtySource DirtySource
	// LiveCheckpoint: SaveState leaves a machine that Continue brings back.
	LiveCheckpoint bool
	// ConsoleLimit bounds the console file, bytes; what comes after is lost.
	ConsoleLimit int64
}

// Driver starts, restores and takes over machines of one kind. Methods may be
// called from several goroutines. The context bounds the call alone: a machine
// lives on when the context of the call that started it ends.
type Driver interface {
	// Name is the Kind in Info and Record.
	Name() string
	// Probe finds out what this host can do. The first call may boot a
	// machine and take seconds; the answer is kept.
	Probe(ctx context.Context) (Info, error)
	Capabilities() Capabilities
	// Boot starts a machine; its virtual CPUs run on return.
	Boot(ctx context.Context, a BootArgs) (Machine, error)
	// Restore starts a machine from a saved state. The machine is stopped on
	// return, nothing of the guest has run, and Continue starts it.
	Restore(ctx context.Context, a RestoreArgs) (Machine, error)
	// Adopt takes over a live machine after a restart of the caller's
	// process. ErrGone (wrapped) says that it no longer lives.
	Adopt(ctx context.Context, r Record) (Machine, error)
}

// Machine is a handle on one process. Methods may be called from several
// goroutines; those that talk to the VMM are carried out one at a time.
// After the machine has ended they fail with ErrGone (wrapped).
type Machine interface {
	PID() int
	// Record for the caller's journal; it does not change.
	Record() Record
	// MemoryFD is the number of HostArgs.Memory's descriptor within the
	// process: /proc/<PID>/fd/<MemoryFD> opens the same file again.
	MemoryFD() int
	// Pause stops the virtual CPUs and finishes disk requests in flight.
	// Pausing a stopped machine is fine. While the disk's server is away it
	// waits for it, so give it a deadline; a Pause that timed out may still
	// take effect, and the Continue that undoes it is carried out after it,
	// even if that times out too.
	Pause(ctx context.Context) error
	// Continue starts the virtual CPUs. On a running machine it does nothing.
	Continue(ctx context.Context) error
	// SaveState writes the device state, without RAM, to w; it stops the
	// machine first and leaves it stopped, also when it fails. The disk must
	// answer until it returns, and w must not block for ever. To save again,
	// Continue first.
	SaveState(ctx context.Context, w io.Writer) error
	// Kill ends the process at once and returns when it is gone; killing a
	// dead one is fine.
	Kill(ctx context.Context) error
	// Done is closed when the process has ended, for whatever reason.
	Done() <-chan struct{}
	// Err is nil until Done is closed, then an *ExitError.
	Err() error
	// Close drops the handle and leaves the machine as it is, running or
	// stopped. Done of a closed handle may never be closed.
	Close()
}

// MemorySaver is a Machine of a driver with OwnMemory, whose SaveState fails
// with ErrTogether: device state and memory are saved together.
type MemorySaver interface {
	// Save is SaveState and returns the memory too: an unlinked file of the
	// size of RAM for the caller to close. With whole unset its data are the
	// pages that changed since the machine started or was last saved, and its
	// holes are not. The VMM begins a new list of changes then, so that a
	// caller who could not keep what it got must ask for the whole next time;
	// so after a Save that failed.
	Save(ctx context.Context, w io.Writer, whole bool) (*os.File, error)
}

var (
	// ErrTogether: device state cannot be saved without the memory.
	ErrTogether = errors.New("device state and memory are saved together")
	// ErrGone: the process has ended, or is not the one the Record names.
	ErrGone = errors.New("virtual machine is gone")
	// ErrIncompatible: this host cannot restore that state.
	ErrIncompatible = errors.New("state does not fit this host")
	// ErrClosed: the handle was closed.
	ErrClosed = errors.New("virtual machine handle is closed")
)

// Reason says why a machine ended.
type Reason string

const (
	ReasonShutdown Reason = "guest shut down"
	ReasonReset    Reason = "guest reset"
	ReasonPanic    Reason = "guest kernel panicked"
	ReasonKilled   Reason = "killed by its owner"
	// ReasonProcess: the VMM process itself ended: it crashed, gave up, or
	// was killed by somebody else.
	ReasonProcess Reason = "virtual machine process ended"
)

// ExitError is the end of a machine.
type ExitError struct {
	ID     string
	Reason Reason
	// Status of the process, such as "signal: killed"; empty where the
	// process was not our child and nobody could learn it.
	Status string
	At     time.Time
	// Stderr and Console are the last lines of the two logs, for the log of
	// the host: the console is written by the guest and must not be trusted.
	Stderr, Console string
}

func (e *ExitError) Error() string {
	s := "sandbox " + e.ID + ": " + string(e.Reason)
	if e.Status != "" {
		s += " (" + e.Status + ")"
	}
	if e.Stderr != "" {
		s += ": " + e.Stderr
	}
	return s
}

// Unwrap makes errors.Is(err, ErrGone) true.
func (e *ExitError) Unwrap() error { return ErrGone }
