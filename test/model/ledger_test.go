package model

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

//go:embed testdata/ledger.py
var ledgerProgram string

const (
	ledgerPath = "/root/ledger.py"
	ledgerPort = 7070
	ledgerDir  = "/var/lib/ledger"
)

// answer is what the ledger says.
type answer struct {
	PID          int                 `json:"pid"`
	Born         string              `json:"born"` // random, made once at its start
	Done         uint64              `json:"done"` // the number of its last change
	Memory       string              `json:"memory"`
	Files        map[string]string   `json:"files"`
	MemoryBlocks []uint32            `json:"memory_blocks"`
	FileBlocks   map[string][]uint32 `json:"file_blocks"`
	Error        string              `json:"error"`
}

// startLedger starts a ledger of so many blocks of memory and waits for it.
func startLedger(ctx context.Context, s *harness.Server, id string, blocks int) error {
	put := client.PutOptions{User: "root"}
	if err := s.PutFile(ctx, id, ledgerPath, strings.NewReader(ledgerProgram), put); err != nil {
		return fmt.Errorf("put the ledger: %w", err)
	}
	line := fmt.Sprintf(`setsid python3 %s %d %s %d /run/ledger >/run/ledger.log 2>&1 </dev/null &
		for i in $(seq 600); do [ -e /run/ledger ] && exit 0; sleep 0.1; done
		cat /run/ledger.log; exit 1`, ledgerPath, blocks, ledgerDir, ledgerPort)
	r, err := s.Exec(ctx, id, client.ExecRequest{Cmd: "/bin/bash", Args: []string{"-c", line}, User: "root", TimeoutSec: 90})
	if err != nil {
		return fmt.Errorf("start the ledger: %w", err)
	}
	if r.ExitCode != 0 {
		return fmt.Errorf("the ledger does not start: exit code %d: %s%s", r.ExitCode, r.Stdout, r.Stderr)
	}
	return nil
}

// askLedger sends one request. Bash speaks TCP itself: a second interpreter for
// each question would cost more than the answer.
func askLedger(ctx context.Context, s *harness.Server, id string, request any) (a answer, err error) {
	q, err := json.Marshal(request)
	if err != nil {
		return a, err
	}
	line := fmt.Sprintf(`exec 3<>/dev/tcp/127.0.0.1/%d && printf '%%s\n' "$1" >&3 && exec cat <&3`, ledgerPort)
	r, err := s.Exec(ctx, id, client.ExecRequest{Cmd: "/bin/bash", Args: []string{"-c", line, "ask", string(q)}, User: "root", TimeoutSec: 60})
	if err != nil {
		return a, err
	}
	if r.ExitCode != 0 || r.TimedOut {
		return a, fmt.Errorf("the ledger of %s cannot be asked: exit code %d, timed out %v: %s%s", id, r.ExitCode, r.TimedOut, r.Stdout, r.Stderr)
	}
	if err := json.Unmarshal(r.Stdout, &a); err != nil {
		return a, fmt.Errorf("the ledger of %s says %.200q: %w", id, r.Stdout, err)
	}
	if a.Error != "" {
		return a, fmt.Errorf("the ledger of %s: %s", id, a.Error)
	}
	return a, nil
}

// question is a request that changes nothing.
type question struct {
	Do string `json:"do"`
}

// compare makes checksums in the guest and holds them against what it must hold.
func compare(ctx context.Context, s *harness.Server, id, born string, want holding, seeds map[uint64]bool) error {
	a, err := askLedger(ctx, s, id, question{"check"})
	if err != nil {
		return err
	}
	if a.Born != born {
		return fmt.Errorf("the ledger of %s was born as %s, want %s: it is another process", id, a.Born, born)
	}
	if a.Done != want.done {
		return fmt.Errorf("the ledger of %s has done %d, want %d", id, a.Done, want.done)
	}
	var wrong []string
	if a.Memory != want.memory.digest() {
		wrong = append(wrong, "memory")
	}
	for name, f := range want.files {
		if a.Files[name] != f.digest() {
			wrong = append(wrong, name)
		}
	}
	for name := range a.Files {
		if _, ok := want.files[name]; !ok {
			wrong = append(wrong, name)
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	b, err := askLedger(ctx, s, id, question{"blocks"})
	if err != nil {
		return fmt.Errorf("%s holds wrong content in %v, and cannot be asked for more: %w", id, wrong, err)
	}
	report := fmt.Sprintf("%s holds wrong content", id)
	for _, name := range wrong {
		have, c := b.FileBlocks[name], want.files[name]
		if name == "memory" {
			have, c = b.MemoryBlocks, want.memory
		}
		report += fmt.Sprintf("\n  %s: %s", name, c.differences(have, seeds))
	}
	return fmt.Errorf("%s", report)
}

// within bounds one call.
func within(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}
