package nested

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/template"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/vmmtest"
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

func copyTo(t *testing.T, to, from string) {
	t.Helper()
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
}

// TestDriverInNestedMachine runs the tests of the Firecracker driver on the
// real program.
func TestDriverInNestedMachine(t *testing.T) {
	requireNested(t)
	dir := tree(t)
	Build(t, filepath.Join(dir, "t/firecracker"), "test", "git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker")
	// The others need a shell, and run everywhere.
	args := []string{"/t/firecracker", "-test.v", "-test.timeout=5m", "-test.run=^TestVM"}
	if run := os.Getenv("WRENN_NESTED_RUN"); run != "" {
		args = append(args, "-test.run="+run)
	}
	m := Machine{
		Tree: dir, DiskMB: 1024, MemoryMB: 2048, Limit: 6 * time.Minute,
		Steps: []Step{{Name: "driver", Args: args, Env: nestedEnv, Dir: "/t"}},
	}
	Report(t, m.Steps, m.Run(t))
}
