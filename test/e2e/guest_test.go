package e2e

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// keeperProgram is a Python process that keeps its state in memory only: a
// dictionary, random data with its checksum, a counter that a thread advances.
//
//go:embed testdata/keeper.py
var keeperProgram string

// keeperPath is the program in the guest; its socket lies beside it.
const (
	keeperPath   = "/tmp/keeper.py"
	keeperSocket = "/tmp/keeper.sock"
)

// keeperAnswer is what the keeper says of itself.
type keeperAnswer struct {
	PID     int    `json:"pid"`
	Born    string `json:"born"`    // random, made once at its start
	Blob    string `json:"blob"`    // MD5 of its random data, computed now
	Made    string `json:"made"`    // the same, computed when it was made
	Counter int64  `json:"counter"` // advanced ten times a second
	Value   string `json:"value"`
	Error   string `json:"error"`
}

// startKeeper starts a keeper of mib MiB of random data and waits for it.
func startKeeper(ctx context.Context, s *harness.Server, id string, mib int) error {
	if err := s.PutFile(ctx, id, keeperPath, strings.NewReader(keeperProgram), client.PutOptions{}); err != nil {
		return fmt.Errorf("put the keeper: %w", err)
	}
	// Its own session, and none of our descriptors: the exec ends at once.
	_, err := s.Sh(ctx, id, fmt.Sprintf(`
		setsid python3 %s %s %d >/tmp/keeper.log 2>&1 </dev/null &
		for i in $(seq 600); do [ -S %s ] && exit 0; sleep 0.1; done
		cat /tmp/keeper.log; exit 1`, keeperPath, keeperSocket, mib, keeperSocket))
	return err
}

// askKeeper sends one request: "stat", "set VALUE".
func askKeeper(ctx context.Context, s *harness.Server, id, request string) (a keeperAnswer, err error) {
	r, err := s.Exec(ctx, id, client.ExecRequest{
		Cmd: "python3", Args: []string{keeperPath, "ask", keeperSocket, request}, TimeoutSec: 60,
	})
	if err != nil {
		return a, err
	}
	if r.ExitCode != 0 {
		return a, fmt.Errorf("ask the keeper of %s: exit code %d: %s%s", id, r.ExitCode, r.Stdout, r.Stderr)
	}
	if err := json.Unmarshal(r.Stdout, &a); err != nil {
		return a, fmt.Errorf("the keeper of %s says %q: %w", id, r.Stdout, err)
	}
	if a.Error != "" {
		return a, fmt.Errorf("the keeper of %s: %s", id, a.Error)
	}
	if a.Blob != a.Made {
		return a, fmt.Errorf("the memory of %s is damaged: MD5 %s, was %s", id, a.Blob, a.Made)
	}
	return a, nil
}

// ask is askKeeper for tests.
func ask(t *testing.T, s *harness.Server, id, request string) keeperAnswer {
	t.Helper()
	a, err := askKeeper(timeout(t, 2*time.Minute), s, id, request)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// makeWarm boots base, starts a keeper of 32 MiB in it and freezes it.
func makeWarm(ctx context.Context, s *harness.Server) error {
	sb, err := s.CreateSandbox(ctx, client.CreateSandboxRequest{})
	if err != nil {
		return fmt.Errorf("boot base: %w", err)
	}
	if err := startKeeper(ctx, s, sb.ID, 32); err != nil {
		return err
	}
	if _, err := s.CreateSnapshot(ctx, sb.ID, warm); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return s.DeleteSandbox(ctx, sb.ID)
}
