package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

const storeLong = `Look after the store of a server on this machine.

These commands read the state directory itself, so that they also help where no
server can start. Only gc asks the server where one runs: it alone knows what is
under way.`

func newStoreCmd() *cobra.Command {
	cmd := groupCmd("store", "Verify, measure and clean the snapshot store of this machine")
	cmd.Long = storeLong
	var dir string
	cmd.PersistentFlags().StringVar(&dir, "dir", stateDir(), "state directory")
	addOutputFlags(cmd)
	cmd.AddCommand(newStoreVerifyCmd(&dir), newStoreUsageCmd(&dir), newStoreGCCmd(&dir))
	return cmd
}

func openStore(dir string, readOnly bool) (*snapshot.Store, error) {
	path := filepath.Join(dir, "store")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("there is no store in %s; --dir or WRENN_DIR names another state directory", dir)
	}
	return snapshot.Open(path, snapshot.Options{ReadOnly: readOnly, Logger: newLogger(upOptions{})})
}

func newStoreVerifyCmd(dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "verify", Short: "Read everything that is stored and compare the checksums",
		Long: "Read everything that is stored and compare the checksums. It may run beside a server. Exit code 1 when anything is damaged.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			store, err := openStore(*dir, true)
			if err != nil {
				return err
			}
			defer store.Close()
			show, end := progressOn(cmd.ErrOrStderr())
			problems, err := store.Verify(cmd.Context(), func(done, total int64) { show("verify", done, total) })
			end()
			if err != nil {
				return err
			}
			return reportProblems(outputOf(cmd), problems)
		},
	}
}

func reportProblems(o output, problems []snapshot.Problem) error {
	type problem struct {
		File     string      `json:"file"`
		Offset   int64       `json:"offset"`
		Affected []format.ID `json:"affected"`
		Error    string      `json:"error"`
	}
	list := []problem{}
	for _, p := range problems {
		list = append(list, problem{p.File, p.Offset, p.Affected, p.Err.Error()})
	}
	if o.json {
		if err := o.printJSON(map[string]any{"problems": list}); err != nil {
			return err
		}
	}
	for _, p := range list {
		if !o.json {
			fmt.Fprintf(o.w, "%s, byte %d: %s\n  affected: %v\n", p.File, p.Offset, p.Error, p.Affected)
		}
	}
	if len(list) > 0 {
		return fmt.Errorf("the store is damaged in %d places", len(list))
	}
	if !o.json {
		fmt.Fprintln(o.w, "everything is as it was written")
	}
	return nil
}

func newStoreUsageCmd(dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "usage", Short: "Tell what each snapshot and pause takes, alone and shared",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			store, err := openStore(*dir, true)
			if err != nil {
				return err
			}
			defer store.Close()
			usage, err := usageOf(store)
			if err != nil {
				return err
			}
			o := outputOf(cmd)
			if o.json {
				return o.printJSON(map[string]any{"usage": usage})
			}
			var rows [][]string
			for _, u := range usage {
				rows = append(rows, []string{u.Name, u.Kind, u.Sandbox, fmt.Sprint(u.Generation), mebibytes(u.OwnBytes), mebibytes(u.SharedBytes)})
			}
			return o.table([]string{"NAME", "KIND", "SANDBOX", "GENERATION", "OWN", "SHARED"}, rows)
		},
	}
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// usageRow is what one manifest keeps in the store.
type usageRow struct {
	Name       string    `json:"name"`
	Kind       string    `json:"kind"`
	Sandbox    string    `json:"sandbox_id"`
	ID         format.ID `json:"id"`
	Generation uint64    `json:"generation"`
	// OwnBytes would be freed with it; SharedBytes are needed by others too.
	OwnBytes    int64 `json:"own_bytes"`
	SharedBytes int64 `json:"shared_bytes"`
}

func usageOf(store *snapshot.Store) ([]usageRow, error) {
	usage, _, err := store.Usage()
	if err != nil {
		return nil, fmt.Errorf("%w; `wrenn store verify` tells more", err)
	}
	rows := make([]usageRow, 0, len(usage))
	for _, u := range usage {
		m := u.Manifest
		rows = append(rows, usageRow{
			Name: m.Name, Kind: m.Kind, Sandbox: m.SandboxID, ID: m.ID, Generation: m.Generation,
			OwnBytes: u.Own, SharedBytes: u.Shared,
		})
	}
	return rows, nil
}

var errStateTaken = errors.New("a wrenn server has it; end that, or choose another with --dir")

// lockState takes a state directory for this process alone; the lock ends with
// the file.
func lockState(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the state directory's lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errStateTaken
		}
		return nil, fmt.Errorf("state directory %s: %w", dir, err)
	}
	return f, nil
}
