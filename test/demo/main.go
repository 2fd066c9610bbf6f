// Command demo shows what Wrenn does, on real virtual machines: it runs a
// server, lets a Python process load a real data set into its memory, pauses
// and resumes it, freezes it as a snapshot and spawns three clones at once. It
// checks each promise as it goes and exits 1 if one does not hold.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	err := run(ctx)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "\nThe demo failed:", err)
		os.Exit(1)
	}
	fmt.Println("\nEverything was as it should be.")
}

// demo is the state that the steps share.
type demo struct {
	s     *harness.Server
	t     *table
	store string
	// source is the sandbox, pid its long-lived Python process.
	source string
	pid    string
	answer string // of the process, from its memory
	digest string // of the file on its disk
	clones []string
}

func run(ctx context.Context) (err error) {
	dir := filepath.Join(harness.DevDir(), "demo")
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("clear the last demo: %w", err)
	}
	log, err := os.CreateTemp("", "wrenn-demo-*.log")
	if err != nil {
		return err
	}
	defer log.Close()
	d := &demo{t: &table{w: os.Stdout}, store: filepath.Join(dir, "store")}
	fmt.Printf("Wrenn demo. The server's log: %s\n\n", log.Name())
	if err := d.startServer(ctx, dir, log); err != nil {
		return fmt.Errorf("%w (see %s)", err, log.Name())
	}
	defer func() {
		err = errors.Join(err, d.finish())
		if err != nil {
			err = fmt.Errorf("%w (see %s)", err, log.Name())
		}
	}()
	steps := []func(context.Context) error{
		d.create, d.load, d.writeFiles, d.pause, d.resume, d.ask, d.secondPause, d.snapshot, d.spawn, d.compare, d.destroy,
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
	}
	d.t.print()
	return nil
}

// timed measures an operation with what it wrote to the store.
func (d *demo) timed(op func() error) (took time.Duration, written int64, err error) {
	before := harness.DiskUsage(d.store)
	t := time.Now()
	err = op()
	took = time.Since(t)
	return took, max(0, harness.DiskUsage(d.store)-before), err
}

func (d *demo) startServer(ctx context.Context, dir string, log *os.File) error {
	fmt.Println("  starting wrenn up (the first time, it builds the base template: some minutes) …")
	t := time.Now()
	s, err := harness.Start(ctx, harness.Options{Dir: dir, Output: log, Args: []string{"--on-exit", "destroy"}})
	if err != nil {
		return err
	}
	d.s = s
	d.t.say(row{"wrenn up", time.Since(t), harness.DiskUsage(d.store), -1, "base template ready, API on " + s.URL})
	return nil
}

func (d *demo) create(ctx context.Context) error {
	var sb *client.Sandbox
	took, _, err := d.timed(func() (err error) {
		sb, err = d.s.CreateSandbox(ctx, client.CreateSandboxRequest{Template: "base", VCPUs: 1, MemoryMB: 512})
		return err
	})
	if err != nil {
		return fmt.Errorf("create a sandbox: %w", err)
	}
	d.source = sb.ID
	kernel, err := d.s.Sh(ctx, sb.ID, "uname -r")
	if err != nil {
		return err
	}
	d.t.say(row{"create a sandbox (cold boot)", took, -1, -1, "a VM of its own with Linux " + kernel})
	return nil
}

// load starts a Python process that reads the data set and keeps what it
// computed in its memory.
func (d *demo) load(ctx context.Context) error {
	data, err := dataset()
	if err != nil {
		return err
	}
	for path, content := range map[string][]byte{"/home/user/orders.csv": data, "/home/user/serve.py": serveProgram} {
		if err := d.s.PutFile(ctx, d.source, path, bytes.NewReader(content), client.PutOptions{Size: int64(len(content))}); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	took, _, err := d.timed(func() error {
		// It says its number when it has read everything and listens.
		d.pid, err = d.s.Sh(ctx, d.source, "mkfifo /tmp/ready; setsid python3 serve.py orders.csv </dev/null >/tmp/serve.log 2>&1 & cat /tmp/ready")
		return err
	})
	if err != nil {
		return fmt.Errorf("start the Python process: %w", err)
	}
	if d.answer, err = d.query(ctx, d.source, "summary"); err != nil {
		return err
	}
	d.t.say(row{fmt.Sprintf("Python loads %d rows (%.1f MiB of CSV)", datasetRows, float64(len(data))/(1<<20)), took, -1, -1, "PID " + d.pid + ": " + d.answer})
	return nil
}

// query asks the long-lived process over its socket.
func (d *demo) query(ctx context.Context, id, what string) (string, error) {
	return d.s.Sh(ctx, id, "exec 3<>/dev/tcp/127.0.0.1/7000 && echo "+what+" >&3 && cat <&3")
}

const fileDigest = "cd /home/user && sha256sum notes.bin | cut -c1-16"

func (d *demo) writeFiles(ctx context.Context) error {
	took, _, err := d.timed(func() error {
		_, err := d.s.Sh(ctx, d.source, "head -c 8388608 /dev/urandom > /home/user/notes.bin")
		return err
	})
	if err != nil {
		return err
	}
	if d.digest, err = d.s.Sh(ctx, d.source, fileDigest); err != nil {
		return err
	}
	d.t.say(row{"write 8 MiB of random bytes to its disk", took, -1, -1, "sha256 " + d.digest + "…"})
	return nil
}

func (d *demo) pause(ctx context.Context) error {
	vm := d.s.VM(d.source)
	if vm == nil {
		return errors.New("the sandbox's VM process cannot be found")
	}
	held := vm.Memory()
	took, written, err := d.timed(func() error { _, err := d.s.PauseSandbox(ctx, d.source); return err })
	if err != nil {
		return fmt.Errorf("pause: %w", err)
	}
	if p := d.s.VM(d.source); p != nil {
		return fmt.Errorf("the sandbox is paused but its VM process %d lives", p.PID)
	}
	d.t.say(row{"pause (all of its state is on the disk)", took, written, -1, "the VM's process is gone, and the " + size(held) + " of RAM that it held"})
	return nil
}

func (d *demo) resume(ctx context.Context) error {
	took, _, err := d.timed(func() error {
		if _, err := d.s.ResumeSandbox(ctx, d.source); err != nil {
			return err
		}
		_, err := d.s.Exec(ctx, d.source, client.ExecRequest{Cmd: "/bin/true"})
		return err
	})
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	d.t.say(row{"resume, until it has run a command", took, -1, d.private(ctx, d.source), "every process goes on"})
	return nil
}

// private is the guest memory that only this sandbox owns; -1 if not known.
func (d *demo) private(ctx context.Context, id string) int64 {
	m, err := d.s.GetMetrics(ctx, id)
	if err != nil {
		return -1
	}
	return int64(m.PrivateMemoryBytes)
}

// ask proves that the same process answers from the same memory.
func (d *demo) ask(ctx context.Context) error {
	t := time.Now()
	answer, err := d.query(ctx, d.source, "summary")
	if err != nil {
		return fmt.Errorf("the process does not answer after the resume: %w", err)
	}
	if answer != d.answer {
		return fmt.Errorf("after the resume the process answers %q, before it %q", answer, d.answer)
	}
	pid, err := d.query(ctx, d.source, "pid")
	if err != nil || pid != d.pid {
		return fmt.Errorf("the process has PID %q (%v), before the pause it had %s", pid, err, d.pid)
	}
	if digest, err := d.s.Sh(ctx, d.source, fileDigest); err != nil || digest != d.digest {
		return fmt.Errorf("the file on the disk has sha256 %q (%v), before the pause it had %s", digest, err, d.digest)
	}
	d.t.say(row{"the same process answers from its memory", time.Since(t), -1, -1, "PID " + pid + ": " + answer})
	return nil
}

// secondPause shows that a pause writes only what changed.
func (d *demo) secondPause(ctx context.Context) error {
	took, written, err := d.timed(func() error { _, err := d.s.PauseSandbox(ctx, d.source); return err })
	if err != nil {
		return fmt.Errorf("pause again: %w", err)
	}
	d.t.say(row{"pause again (only what changed is written)", took, written, -1, ""})
	if _, err := d.s.ResumeSandbox(ctx, d.source); err != nil {
		return fmt.Errorf("resume again: %w", err)
	}
	return nil
}

func (d *demo) snapshot(ctx context.Context) error {
	var snap *client.Snapshot
	took, _, err := d.timed(func() (err error) {
		snap, err = d.s.CreateSnapshot(ctx, d.source, "warm-python")
		return err
	})
	if err != nil {
		return fmt.Errorf("take the snapshot: %w", err)
	}
	if _, err := d.query(ctx, d.source, "summary"); err != nil {
		return fmt.Errorf("the source does not go on after the snapshot: %w", err)
	}
	d.t.say(row{"snapshot it as warm-python", took, snap.SizeBytes, -1, "the source goes on"})
	return nil
}

func (d *demo) destroy(ctx context.Context) error {
	t := time.Now()
	for _, id := range append(d.clones, d.source) {
		if err := d.s.DeleteSandbox(ctx, id); err != nil {
			return fmt.Errorf("destroy: %w", err)
		}
	}
	if err := d.s.DeleteSnapshot(ctx, "warm-python"); err != nil {
		return fmt.Errorf("delete the snapshot: %w", err)
	}
	for _, p := range harness.ProcessesOf(filepath.Join(d.s.Dir, "sandboxes") + "/") {
		return fmt.Errorf("all sandboxes are destroyed but process %d lives", p.PID)
	}
	d.t.say(row{"destroy four sandboxes and the snapshot", time.Since(t), -1, -1, "no process is left"})
	return nil
}

// finish ends the server and checks that nothing stays behind.
func (d *demo) finish() error {
	if err := d.s.Stop(); err != nil {
		return fmt.Errorf("end the server: %w", err)
	}
	if !harness.Eventually(5*time.Second, func() bool { return len(harness.ProcessesOf(d.s.Dir)) == 0 }) {
		d.s.Wipe()
		return errors.New("processes were left behind; they are killed now")
	}
	return os.RemoveAll(d.s.Dir)
}
