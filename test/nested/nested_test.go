package nested

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// nestedEnv is what the tests in the machine find their parts by.
var nestedEnv = []string{"WRENN_TEST_KVM=1", "WRENN_TEST_ASSETS=/assets", "TMPDIR=/tmp"}

// requireNested skips where the machine cannot be, or need not be.
func requireNested(t *testing.T) {
	t.Helper()
	vmmtest.RequireQEMU(t)
	if os.Getenv("WRENN_TEST_KVM") == "1" {
		t.Skip("skipped: this host has KVM (WRENN_TEST_KVM=1), and the tests run straight on it")
	}
}

// tree makes the file system that all machines have.
func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"usr/bin", "assets", "t"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	Firecracker(t, filepath.Join(dir, "usr/bin"))
	bzImage, _ := vmmtest.Kernel(t)
	b, err := os.ReadFile(bzImage)
	if err == nil {
		b, err = template.Vmlinux(b)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "assets/vmlinux"), b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	copyTo(t, filepath.Join(dir, "assets/initrd"), vmmtest.Initrd(t))
	return dir
}

// neverCameUp is what tests say of a guest whose kernel never got to its first
// program. One emulation of a processor in the other serves a guest's timer in
// milliseconds: where the machine gets too little of the real processors, it does
// nothing else any more, with nothing of ours running in the guest yet.
var neverCameUp = regexp.MustCompile(`no \d+ ticks within \S+, but 0;|create from "": |boot the guest's kernel: it hung`)

// runAgain runs the machine, and a second one where a guest never came up in the
// first or the emulator itself crashed. What else fails is not tried again, and
// neither is the second.
func runAgain(t *testing.T, m Machine) []byte {
	t.Helper()
	out, err := m.Run(t)
	if neverCameUp.Match(out) || crashed(err) {
		t.Logf("a guest never came up, or QEMU crashed, so there is a second machine; in the first one (%v):\n%s", err, tail(out, 16<<10))
		out, err = m.Run(t)
	}
	if err != nil {
		t.Error(err)
	}
	return out
}

// TestDriverInNestedMachine runs the tests of the Firecracker driver on the
// real program.
func TestDriverInNestedMachine(t *testing.T) {
	t.Parallel() // each machine has one processor
	requireNested(t)
	dir := tree(t)
	Build(t, filepath.Join(dir, "t/firecracker"), "test", "git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker")
	// The others need a shell, and run everywhere.
	args := []string{"/t/firecracker", "-test.v", "-test.timeout=25m", "-test.run=^TestVM"}
	if run := os.Getenv("WRENN_NESTED_RUN"); run != "" {
		args = append(args, "-test.run="+run)
	}
	m := Machine{
		Tree: dir, DiskMB: 1024, MemoryMB: 2048, Limit: 30 * time.Minute,
		Steps: []Step{{Name: "driver", Args: args, Env: nestedEnv, Dir: "/t"}},
	}
	Report(t, m.Steps, runAgain(t, m))
}

// lifeCycle are the tests of test/e2e that run on Firecracker too.
const lifeCycle = "^(TestDoctorTellsWhatRunsVMs|TestEveryDriverDoesTheWholeLifeCycle)$"

// TestLifeCycleOnFirecracker runs end-to-end tests on a server whose VMs are
// Firecracker's: in a nested machine, or on this host where it has KVM.
func TestLifeCycleOnFirecracker(t *testing.T) {
	t.Parallel() // each machine has one processor
	bin := harness.Bin()
	for _, p := range []string{"wrenn", "envd"} {
		if _, err := os.Stat(filepath.Join(bin, p)); err != nil {
			t.Skip("needs the programs (make build):", err)
		}
	}
	args := []string{"-test.v", "-test.timeout=40m", "-test.run=" + lifeCycle}
	if run := os.Getenv("WRENN_NESTED_RUN"); run != "" {
		args = append(args, "-test.run="+run)
	}
	env := []string{"WRENN_TEST_DRIVER=firecracker"}
	const pkg, limit = "git.omukk.dev/wrenn/sandbox/test/e2e", 45 * time.Minute
	if os.Getenv("WRENN_TEST_KVM") == "1" {
		vmmtest.RequireKVM(t)
		prog := filepath.Join(t.TempDir(), "e2e")
		Build(t, prog, "test", pkg)
		steps := []Step{{Name: "e2e", Args: append([]string{prog}, args...), Env: env, Dir: filepath.Dir(prog)}}
		Report(t, steps, Here(t, steps, limit))
		return
	}
	requireNested(t)
	dir := tree(t)
	Base(t, dir, "cache")
	for _, p := range []string{"wrenn", "envd"} {
		copyTo(t, filepath.Join(dir, "usr/bin", p), filepath.Join(bin, p))
	}
	Build(t, filepath.Join(dir, "t/e2e"), "test", pkg)
	env = append(env, "WRENN_TEST_OWN_MACHINE=1", "WRENN_TEST_VERBOSE="+os.Getenv("WRENN_TEST_VERBOSE"), "WRENN_BIN=/usr/bin", "WRENN_CACHE=/cache", "WRENN_DEV_DIR=/var/tmp/w")
	m := Machine{
		Tree: dir, DiskMB: 6 << 10, MemoryMB: 3 << 10, Limit: limit,
		Steps: []Step{{Name: "e2e", Args: append([]string{"/t/e2e"}, args...), Env: append(env, nestedEnv...), Dir: "/t"}},
	}
	Report(t, m.Steps, runAgain(t, m))
}

// TestResumeInNestedMachine measures resumes beside Firecracker's own loads; the
// figures are lines of its log. `make bench` runs it.
func TestResumeInNestedMachine(t *testing.T) {
	if os.Getenv("WRENN_BENCH") != "1" {
		t.Skip("skipped: it measures; make bench runs it")
	}
	requireNested(t)
	dir := tree(t)
	Build(t, filepath.Join(dir, "t/engine"), "test", "git.omukk.dev/wrenn/sandbox/internal/engine")
	m := Machine{
		Tree: dir, DiskMB: 1024, MemoryMB: 2048, Limit: 12 * time.Minute,
		Steps: []Step{{
			Name: "resume", Args: []string{"/t/engine", "-test.v", "-test.timeout=10m", "-test.run=^TestVM"},
			Env: append([]string{"WRENN_BENCH=1"}, nestedEnv...), Dir: "/t",
		}},
	}
	out, err := m.Run(t)
	if err != nil {
		t.Error(err)
	}
	Report(t, m.Steps, out)
}
