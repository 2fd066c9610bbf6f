package template

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFailureNamesTheRemedyAndLeavesNothing(t *testing.T) {
	for _, c := range []struct{ name, script, want string }{
		{"unreachable mirror",
			"echo 'E: Failed to fetch http://x/InRelease  Could not resolve host' >&2; exit 100", "mirror cannot be reached"},
		{"full disk", "echo 'dpkg: error: No space left on device' >&2; exit 1", "disk is full"},
		{"unknown keys", "echo 'W: GPG error: NO_PUBKEY 0E98404D386FA1D9' >&2; exit 1", "debian-archive-keyring"},
		{"incomplete mirror", "echo 'E: Unable to locate package python3' >&2; exit 1", "complete mirror"},
		{"something else", "echo 'E: boom' >&2; exit 7", "E: boom"},
		{"no kernel module", "sed -i /virtio_blk/d $fixture/out/modules.dep", "virtio_blk"},
		{"module is not one", "echo text | tee $fixture/out/kernel/lib/modules/*/kernel/b/virtio_blk.ko", "not an ELF"},
		{"strange version", "echo ../../x >$fixture/out/version", "not a kernel version"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t)
			f.script(t, c.script)
			_, err := f.builder().build(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want it to contain %q", err, c.want)
			}
			f.noRests(t)
		})
	}
}

func TestBuildAfterAFailureStartsAfresh(t *testing.T) {
	f := newFixture(t)
	f.script(t, "mkdir -p $root/etc; echo half >$root/etc/half; exit 1")
	if _, err := f.builder().build(t.Context()); err == nil {
		t.Fatal("the failing build did not fail")
	}
	f.script(t, "")
	r := f.build(t)
	if got := debugfs(t, r.Rootfs, "ls /etc"); strings.Contains(got, "half") || !strings.Contains(got, "old") {
		t.Errorf("/etc holds %s", got)
	}
}

func TestFullDiskIsSaidBeforeTheWork(t *testing.T) {
	f := newFixture(t)
	if err := os.Mkdir(f.o.Cache, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", f.o.Cache, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("a small disk needs the right to mount: %v", err)
	}
	defer unix.Unmount(f.o.Cache, unix.MNT_DETACH)
	b := f.builder()
	b.space = packagesSpace
	_, err := b.build(t.Context())
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "8 MiB free") {
		t.Errorf("error is %v", err)
	}
	if f.runs(t) != 0 {
		t.Error("mmdebstrap ran although the disk is too small")
	}
	// With the check out of the way the disk fills up in the middle.
	b = f.builder()
	f.script(t, "dd if=/dev/zero of=$root bs=1M count=20")
	if _, err = b.build(t.Context()); err == nil || !strings.Contains(err.Error(), "disk is full") {
		t.Errorf("error is %v", err)
	}
	f.noRests(t)
}

// startStuckBuild starts a build in another process and waits until its
// mmdebstrap is stuck, with something mounted.
func startStuckBuild(t *testing.T, f *fixture) *exec.Cmd {
	t.Helper()
	f.script(t, `mkdir -p $root/proc
mount -t tmpfs tmpfs $root/proc || true
sleep 1000 &
: >$fixture/stuck
sleep 1000`)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), helperDir+"="+f.dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for range 6000 {
		if _, err := os.Stat(filepath.Join(f.dir, "stuck")); err == nil {
			return cmd
		}
		time.Sleep(10 * time.Millisecond) // another process's progress has no event
	}
	t.Fatal("the build did not start mmdebstrap")
	return nil
}

// sleepers lists the processes below the fixture's directory's root, by their
// working directory.
func (f *fixture) sleepers(t *testing.T) []string {
	t.Helper()
	var found []string
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if cwd, err := os.Readlink(l); err == nil && strings.HasPrefix(cwd, f.o.Cache) {
			found = append(found, l)
		}
	}
	return found
}

func (f *fixture) wantNoSleepers(t *testing.T) {
	t.Helper()
	for range 6000 {
		if len(f.sleepers(t)) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond) // the end of somebody else's child has no event
	}
	t.Errorf("outlived the build: %v", f.sleepers(t))
}

func TestKilledBuildLeavesNothingThatIsTrusted(t *testing.T) {
	f := newFixture(t)
	cmd := startStuckBuild(t, f)
	if len(f.sleepers(t)) == 0 {
		t.Fatal("mmdebstrap is not running: the test would prove nothing")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	f.wantNoSleepers(t)
	mounts, err := mountsBelow(f.dir)
	if err != nil || len(mounts) > 0 {
		t.Errorf("mounts outlived the build: %v, %v", mounts, err)
	}
	f.script(t, "")
	f.build(t)
	f.noRests(t)
}

func TestCancelledBuildEndsItsChildren(t *testing.T) {
	f := newFixture(t)
	f.script(t, "sleep 1000 & echo up >&2; sleep 1000")
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the user changed her mind")
	b := f.builder()
	b.o.Progress = func(step string, _, _ int64) {
		if strings.Contains(step, "apt-get update") {
			cancel(reason)
		}
	}
	start := time.Now()
	_, err := b.build(ctx)
	if !errors.Is(err, reason) {
		t.Errorf("error is %v", err)
	}
	if took := time.Since(start); took > 5*time.Minute { // and not the script's 1,000 s
		t.Errorf("cancelling took %v", took)
	}
	f.wantNoSleepers(t)
	f.noRests(t)
}

func TestSweepUnmountsBeforeItRemoves(t *testing.T) {
	f := newFixture(t)
	rest := filepath.Join(f.o.Cache, tmpPrefix+"old", "root", "with space")
	if err := os.MkdirAll(rest, 0o755); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(f.dir, "precious")
	f.write(t, "precious/file", "x", 0o644)
	if err := unix.Mount(precious, rest, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("a bind mount needs the right to mount: %v", err)
	}
	defer unix.Unmount(rest, unix.MNT_DETACH)
	f.build(t)
	f.noRests(t)
	if _, err := os.Stat(filepath.Join(precious, "file")); err != nil {
		t.Errorf("what was mounted in a rest was removed: %v", err)
	}
}
