package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/vmm"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// journalVersion is written into every journal. A newer one than ours is
// refused: an older program must not guess at what it does not know.
const journalVersion = 1

// journal is all that must be known of a sandbox to take it over after a
// crash. It is replaced atomically before every step that a crash would
// strand. Times are UTC.
type journal struct {
	Version     int               `json:"version"`
	ID          string            `json:"id"`
	Template    string            `json:"template"`
	VCPUs       int               `json:"vcpus"`
	MemoryMB    int               `json:"memory_mb"`
	Envs        map[string]string `json:"envs,omitempty"`
	Annotations []byte            `json:"annotations,omitempty"`
	// AccessToken opens the guest agent; it stays the same for life.
	AccessToken string `json:"access_token"`
	MachineID   string `json:"machine_id"`
	// Egress is what the guest may reach; absent is the default.
	Egress *Egress `json:"egress,omitempty"`

	State     State      `json:"state"`
	Error     string     `json:"error,omitempty"`
	CreatedAt time.Time  `json:"created_at"`
	StartedAt *time.Time `json:"started_at,omitempty"`

	// Manifest is the newest committed pause; zero when there is none. It
	// stays while the sandbox runs, until the next one takes its place.
	Manifest   format.ID `json:"manifest"`
	Generation uint64    `json:"generation"`
	// Pending is the manifest that a capture in progress will commit. The
	// store knows whether it did.
	Pending format.ID `json:"pending"`

	Run *runRecord `json:"run,omitempty"`
}

// runRecord is what one run of the VM holds.
type runRecord struct {
	Slot int `json:"slot"`
	// Life names this run to the guest; a new one makes it renew itself.
	Life string `json:"life"`
	// MemoryImage is what the VM's RAM is a private view of; zero after a
	// boot, when all RAM is its own.
	MemoryImage format.ID `json:"memory_image"`
	DiskImage   format.ID `json:"disk_image"`
	// LastMemory and LastDisk are the newest captures of this run, which a
	// snapshot of a running sandbox leaves behind: the next capture writes
	// only what differs from them.
	LastMemory format.ID `json:"last_memory"`
	LastDisk   format.ID `json:"last_disk"`
	// RAMAddr is where the RAM lies in the VMM process; 0 after a boot.
	RAMAddr uint64 `json:"ram_addr,omitempty"`
	// ChangesLost: a capture began a new list of changed pages in the VMM and
	// was not committed; the next one needs all of the memory.
	ChangesLost bool `json:"changes_lost,omitempty"`
	// ClockBehind: the VM stood still, or is about to, and its guest has not been
	// told the time since.
	ClockBehind bool `json:"clock_behind,omitempty"`
	// WholeImage: the VM may map a file with the whole of MemoryImage, which
	// takes RAM beside its own.
	WholeImage bool `json:"whole_image,omitempty"`
	// KernelDigest is of the kernel that the guest booted with, however many
	// lives ago; EnvdVersion is what its agent said it is.
	KernelDigest string `json:"kernel_digest,omitempty"`
	EnvdVersion  string `json:"envd_version,omitempty"`
	// VM is absent until the VMM process has been started.
	VM *vmm.Record `json:"vm,omitempty"`
}

const (
	journalName = "journal.json"
	overlayName = "overlay"
	diskSocket  = "nbd.sock"
	consoleName = "console.log"
)

// writeJournal replaces the journal in dir: written, synced, renamed, and the
// directory synced, so that either the old or the new one is found.
func writeJournal(dir string, j journal) error {
	b, err := json.MarshalIndent(j, "", " ")
	if err != nil {
		return fmt.Errorf("encode the journal of %s: %w", j.ID, err)
	}
	path := filepath.Join(dir, journalName)
	f, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("create the journal of %s: %w", j.ID, err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(path+".tmp", path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("write the journal of %s: %w", j.ID, err)
	}
	return nil
}

// errNewerJournal: a newer program wrote the journal. It is not ours to judge.
var errNewerJournal = errors.New("the journal is of a newer program")

// errDamagedJournal: there is one, and it is none.
var errDamagedJournal = errors.New("the journal is damaged")

func readJournal(dir string) (journal, error) {
	var j journal
	b, err := os.ReadFile(filepath.Join(dir, journalName))
	if err != nil {
		return j, fmt.Errorf("read the journal: %w", err)
	}
	j, err = decodeJournal(b, filepath.Base(dir))
	if err != nil && !errors.Is(err, errNewerJournal) {
		err = fmt.Errorf("%w: %w", errDamagedJournal, err)
	}
	return j, err
}

// decodeJournal reads the journal of the sandbox id and refuses what this
// program could not act on.
func decodeJournal(b []byte, id string) (journal, error) {
	var j journal
	if err := json.Unmarshal(b, &j); err != nil {
		return j, fmt.Errorf("decode the journal: %w", err)
	}
	if j.Version < 1 {
		return j, fmt.Errorf("the journal's version is %d", j.Version)
	}
	if j.Version > journalVersion {
		return j, fmt.Errorf("%w: its version is %d; this program knows 1 to %d", errNewerJournal, j.Version, journalVersion)
	}
	if err := checkID(j.ID); err != nil || j.ID != id {
		return j, fmt.Errorf("the journal is of %.40q, not of %.40q", j.ID, id)
	}
	return j, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// roots are the images that a run needs, whether or not a manifest does.
func (j journal) roots() []format.ID {
	if j.Run == nil {
		return nil
	}
	var out []format.ID
	for _, id := range []format.ID{j.Run.MemoryImage, j.Run.DiskImage, j.Run.LastMemory, j.Run.LastDisk} {
		if !id.IsZero() {
			out = append(out, id)
		}
	}
	return out
}

// Roots returns the images that the sandboxes of a state directory run on, for
// cleaning its store while no engine has it. A journal that cannot be read is
// an error: what it needs is not known.
func Roots(dir string) ([]format.ID, error) {
	entries, err := os.ReadDir(filepath.Join(dir, "sandboxes"))
	if err != nil {
		return nil, fmt.Errorf("list the sandboxes: %w", err)
	}
	var out []format.ID
	for _, e := range entries {
		j, err := readJournal(filepath.Join(dir, "sandboxes", e.Name()))
		if err != nil {
			return nil, fmt.Errorf("sandbox %s: %w", e.Name(), err)
		}
		out = append(out, j.roots()...)
	}
	return out, nil
}
