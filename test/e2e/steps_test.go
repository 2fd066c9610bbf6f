package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// notHere are operations whose crashes internal/engine tests alone, with why.
var notHere = map[string]string{
	"compact": "needs tens of generations; test/model has them",
}

// stepKiller kills the server after steps.
type stepKiller struct {
	herd
	t    *testing.T // of the step
	all  *testing.T
	file string // names the step to die after
	a    string // runs; herd.paused is paused
	n    int
	// bins are directories of the same programs, but for the digest of the base
	// template that they make.
	bins []string
}

// TestAKillAfterEveryStepLosesNothing kills a real server, by its own hand,
// after every step that the program lists, and starts it again.
func TestAKillAfterEveryStepLosesNothing(t *testing.T) {
	k := &stepKiller{t: t, all: t, file: filepath.Join(t.TempDir(), "kill-after")}
	t.Setenv("WRENN_TEST_KILL_AFTER", k.file)
	s := warmServer(t)
	k.a = spawn(t, s).ID
	b := spawn(t, s).ID
	k.herd = herd{s: s, was: map[string]keeperAnswer{}, paused: b}
	for _, id := range []string{k.a, b} {
		k.was[id] = ask(t, s, id, "set "+id)
	}
	pause(t, s, b)
	for _, op := range listedSteps(t) {
		do, known := k.operations()[op.Op]
		if why, skip := notHere[op.Op]; skip {
			t.Logf("%s: not here: %s", op.Op, why)
			continue
		}
		if !known {
			t.Errorf("the operation %s is listed and has no test here", op.Op)
			continue
		}
		for _, step := range op.Steps {
			t.Run(op.Op+"/"+step, func(t *testing.T) {
				k.t = t
				k.dieAfter(op.Op+"/"+step, do)
				switch op.Op {
				case "died":
					k.removeFailed()
				case "reboot":
					k.rebooted(step)
				case "egress": // what was cut off can be done again
					if err := k.setEgress(timeout(t, time.Minute)); err != nil {
						t.Error(err)
					}
				}
				k.settled(t, "killed after "+op.Op+"/"+step, k.a)
			})
			if t.Failed() {
				return // what follows would build on it
			}
		}
	}
}

type listedOp struct {
	Op    string   `json:"op"`
	Steps []string `json:"steps"`
}

func listedSteps(t *testing.T) []listedOp {
	t.Helper()
	out, err := exec.CommandContext(timeout(t, time.Minute), filepath.Join(harness.Bin(), "wrenn"), "steps").Output()
	if err != nil {
		t.Fatalf("wrenn steps: %v", err)
	}
	var ops []listedOp
	if err := json.Unmarshal(out, &ops); err != nil || len(ops) < 10 {
		t.Fatalf("wrenn steps: %d operations, %v: %s", len(ops), err, out)
	}
	return ops
}

// operations are how each is brought about; the errors are those of a server
// that dies meanwhile.
func (k *stepKiller) operations() map[string]func(ctx context.Context) error {
	s := k.s
	k.n++
	name := fmt.Sprintf("step%d", k.n)
	create := func(template string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: template})
			return err
		}
	}
	snapshot := func(id string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := s.CreateSnapshot(ctx, id, fmt.Sprintf("%s-%d", name, time.Now().UnixNano()))
			return err
		}
	}
	// removed has the armed step come in the removal of a snapshot.
	removed := func(ctx context.Context) error {
		if err := k.disarmed(func() error { _, err := s.CreateSnapshot(ctx, k.paused, name); return err }); err != nil && !client.IsConflict(err) {
			return err
		}
		return s.DeleteSnapshot(ctx, name)
	}
	return map[string]func(context.Context) error{
		"create":          create("base"),
		"spawn":           create(warm),
		"resume":          func(ctx context.Context) error { _, err := s.ResumeSandbox(ctx, k.paused); return err },
		"pause":           func(ctx context.Context) error { _, err := s.PauseSandbox(ctx, k.a); return err },
		"snapshot":        snapshot(k.a),
		"snapshot_paused": snapshot(k.paused),
		"delete_snapshot": removed,
		"sweep":           removed,
		"destroy": func(ctx context.Context) error {
			victim, err := k.victim(ctx)
			if err != nil {
				return err
			}
			return s.DeleteSandbox(ctx, victim)
		},
		"died": func(ctx context.Context) error {
			victim, err := k.victim(ctx)
			if err != nil {
				return err
			}
			s.VM(victim).Kill()
			return nil
		},
		// What a resume that was cut off left is released by the next start.
		"release": func(ctx context.Context) error {
			armed, err := os.ReadFile(k.file)
			if err != nil {
				return err
			}
			k.arm("resume/record_vm")
			_, _ = s.ResumeSandbox(ctx, k.paused)
			<-s.Ended()
			k.arm(string(armed))
			return s.Restart(ctx)
		},
		"egress": k.setEgress,
		"reboot": k.reboot,
		"import": k.importBase,
		"adopt": func(ctx context.Context) error {
			s.Kill()
			return s.Restart(ctx)
		},
	}
}

// setEgress changes what a sandbox may reach, which the E2B surface alone does.
func (k *stepKiller) setEgress(ctx context.Context) error {
	return k.rest(ctx, http.MethodPut, "/e2b/sandboxes/"+k.a+"/network", fmt.Sprintf(`{"denyOut":["203.0.113.%d/32"]}`, k.n%256), http.StatusNoContent)
}

// reboot starts a paused sandbox, the same at each step, from its disk alone,
// which the E2B surface does.
func (k *stepKiller) reboot(ctx context.Context) error {
	if k.aside == "" {
		victim, err := k.victim(ctx)
		if err != nil {
			return err
		}
		k.aside = victim
		err = k.disarmed(func() error {
			_, err := k.s.Sh(ctx, victim, "echo "+victim+" > /home/user/mark && sync")
			if err == nil {
				_, err = k.s.PauseSandbox(ctx, victim)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return k.rest(ctx, http.MethodPost, "/e2b/sandboxes/"+k.aside+"/connect", `{"timeout":600,"memory":false}`, http.StatusCreated)
}

// rebooted checks what a reboot that was cut off left: a sandbox that is paused
// as before, or, after its last step, runs and has its disk.
func (k *stepKiller) rebooted(step string) {
	k.t.Helper()
	sb, err := k.s.GetSandbox(timeout(k.t, time.Minute), k.aside)
	if err != nil {
		k.t.Fatal(err)
	}
	want := client.StatusPaused
	if step == "record_running" {
		want = client.StatusRunning
	}
	if sb.Status != want {
		k.t.Errorf("it is %s (%s), want %s", sb.Status, sb.Error, want)
	}
	if sb.Status == client.StatusRunning {
		if mark := sh(k.t, k.s, k.aside, "cat /home/user/mark"); mark != k.aside {
			k.t.Errorf("after the reboot it has %q on its disk", mark)
		}
		remove(k.t, k.s, k.aside)
		k.aside = ""
	}
}

// importBase starts the server with a base template that its store does not
// have; the sandboxes that run are of the one before.
func (k *stepKiller) importBase(ctx context.Context) error {
	if k.bins == nil {
		k.bins = []string{anotherBase(k.all, k.s), harness.Bin()}
	}
	k.s.Kill()
	k.all.Setenv("WRENN_BIN", k.bins[0])
	k.bins[0], k.bins[1] = k.bins[1], k.bins[0]
	return k.s.Restart(ctx)
}

// anotherBase gives a directory of the programs with a guest agent that differs
// in a byte, so that the base template made with it is another one. From then on
// templates are built in a cache of the test's own, which finds in the shared one
// what that has.
func anotherBase(t *testing.T, s *harness.Server) string {
	t.Helper()
	cache := os.Getenv("WRENN_CACHE")
	if cache == "" {
		cache = s.Dir
	}
	own, bin := filepath.Join(s.Dir, "another-cache"), filepath.Join(s.Dir, "another-bin")
	templates := filepath.Join("templates", "base")
	for _, dir := range []string{filepath.Join(own, templates), bin} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"wrenn", "envd"} {
		b, err := os.ReadFile(filepath.Join(harness.Bin(), name))
		if err == nil && name == "envd" {
			b = append(b, 0) // behind all that is loaded
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(bin, name), b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	share := []string{"cache", "kvm-verdict.json"}
	for _, name := range names(t, filepath.Join(cache, templates)) {
		share = append(share, filepath.Join(templates, name))
	}
	for _, name := range share {
		if err := os.Symlink(filepath.Join(cache, name), filepath.Join(own, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("WRENN_CACHE", own)
	return bin
}

// rest sends a request of the E2B surface.
func (k *stepKiller) rest(ctx context.Context, method, path, body string, want int) error {
	req, err := http.NewRequestWithContext(ctx, method, k.s.URL+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("X-API-Key", apiKey(k.t, k.s))
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != want {
		text, err := io.ReadAll(resp.Body)
		return errors.Join(fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text), err)
	}
	return nil
}

func (k *stepKiller) victim(ctx context.Context) (string, error) {
	var id string
	err := k.disarmed(func() error {
		sb, err := k.s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: warm})
		if err == nil {
			id = sb.ID
		}
		return err
	})
	return id, err
}

// removeFailed removes the victims whose VM was killed: they are in error,
// which says why, and can be deleted.
func (k *stepKiller) removeFailed() {
	k.t.Helper()
	ctx := timeout(k.t, time.Minute)
	found := false
	if !harness.Eventually(time.Minute, func() bool {
		page, err := k.s.ListSandboxes(ctx, client.ListSandboxesOptions{Status: []string{client.StatusError}})
		if err != nil {
			return false
		}
		for _, sb := range page.Sandboxes {
			found = true
			if sb.Error == "" {
				k.t.Errorf("%s is in error and does not say why", sb.ID)
			}
			if err := k.s.DeleteSandbox(ctx, sb.ID); err != nil {
				k.t.Errorf("delete %s: %v", sb.ID, err)
			}
		}
		return found
	}) {
		k.t.Error("the sandbox whose VM was killed is not in error")
	}
}

func (k *stepKiller) arm(step string) {
	k.t.Helper()
	// Renamed into place: the server reads it at any moment.
	if err := os.WriteFile(k.file+".new", []byte(step), 0o600); err != nil {
		k.t.Fatal(err)
	}
	if err := os.Rename(k.file+".new", k.file); err != nil {
		k.t.Fatal(err)
	}
}

// disarmed does f without dying in it.
func (k *stepKiller) disarmed(f func() error) error {
	step, err := os.ReadFile(k.file)
	if err != nil {
		return err
	}
	k.arm("")
	defer k.arm(string(step))
	return f()
}

// dieAfter does the operation, has the server die of it and starts it again.
func (k *stepKiller) dieAfter(step string, do func(context.Context) error) {
	k.t.Helper()
	ctx := timeout(k.t, 2*time.Minute)
	k.arm(step)
	said := beside(func() error { return do(ctx) })
	err := <-said
	select {
	case <-k.s.Ended():
	case <-ctx.Done():
		k.t.Fatalf("the server does not come to %s; the operation said %v", step, err)
	}
	k.arm("")
	if err := k.s.Restart(ctx); err != nil {
		k.t.Fatalf("restart after %s: %v", step, err)
	}
}
