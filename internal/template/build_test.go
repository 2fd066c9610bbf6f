package template

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cavaliergopher/cpio"
)

func TestBuildMakesWhatResultSays(t *testing.T) {
	f := newFixture(t)
	r := f.build(t)
	if r.Cached {
		t.Error("a first build says it was cached")
	}
	if r.KernelVersion != testKernel || r.RootfsSize != minDisk || len(r.Digest) != 64 {
		t.Errorf("result is %+v", r)
	}
	if filepath.Dir(r.Rootfs) != filepath.Join(f.o.Dir, r.Digest) {
		t.Errorf("root file system is at %s, want it in %s", r.Rootfs, r.Digest)
	}
	if st, err := os.Stat(r.Rootfs); err != nil || st.Size() != minDisk || st.Mode() != 0o600 {
		t.Errorf("root file system: %v, %v", st, err)
	}
	if used, err := usedBytes(r.Rootfs); err != nil || used > minDisk/2 {
		t.Errorf("root file system occupies %d bytes (%v), want it sparse", used, err)
	}
	if text, err := os.ReadFile(r.Kernel); err != nil || string(text) != "kernel image" {
		t.Errorf("kernel is %q, %v", text, err)
	}
	for path, want := range map[string]string{
		"/usr/local/bin/envd": "Mode:  0755 User: 0 Group: 0",
		"/home/user":          "Mode:  0755 User: 1000 Group: 1000",
		"/":                   "Mode:  0755 User: 0 Group: 0",
	} {
		if got := inodeOwner(t, r.Rootfs, path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	if got := debugfs(t, r.Rootfs, "cat /usr/local/bin/envd"); got != "\x7fELF the guest agent" {
		t.Errorf("envd in the image is %q", got)
	}
	if got := debugfs(t, r.Rootfs, "ls /var/cache/apt"); strings.Contains(got, "pkgcache") {
		t.Errorf("apt's cache is in the image: %s", got)
	}
	if got := debugfs(t, r.Rootfs, "ls /var/lib/apt/lists"); strings.Contains(got, "mirror") {
		t.Errorf("apt's lists are in the image: %s", got)
	}
	f.noRests(t)
}

// debugfs runs one request on the image.
func debugfs(t *testing.T, image, request string) string {
	t.Helper()
	tool, err := findTool("debugfs")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, "-R", request, image).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func inodeOwner(t *testing.T, image, path string) string {
	t.Helper()
	text := strings.Join(strings.Fields(debugfs(t, image, "stat "+path)), " ")
	field := func(name string) string {
		_, after, _ := strings.Cut(text, name+": ")
		return strings.Fields(after + " ?")[0]
	}
	return "Mode:  " + field("Mode") + " User: " + field("User") + " Group: " + field("Group")
}

func TestInitrdHoldsModulesInLoadOrder(t *testing.T) {
	f := newFixture(t)
	r := f.build(t)
	file, err := os.Open(r.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	got := map[string]string{}
	for reader := cpio.NewReader(file); ; {
		h, err := reader.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(reader)
		if err != nil {
			t.Fatal(err)
		}
		if h.Mode.IsRegular() {
			got[h.Name] = string(text)
		}
		if h.Name == "init" && h.Mode.Perm() != 0o755 {
			t.Errorf("/init has mode %o", h.Mode.Perm())
		}
	}
	want := "virtio.ko\nvirtio_mmio.ko\nvirtio_pci_modern_dev.ko pci\nvirtio_pci.ko pci\n" +
		"virtio_blk.ko\nfailover.ko\nnet_failover.ko\nvirtio_net.ko\ninet_diag.ko\ntcp_diag.ko\n"
	if got["modules/order"] != want {
		t.Errorf("order is\n%s, want\n%s", got["modules/order"], want)
	}
	for line := range strings.Lines(want) {
		name := "modules/" + strings.Fields(line)[0]
		if !strings.HasPrefix(got[name], "\x7fELF") {
			t.Errorf("%s is %q", name, got[name])
		}
	}
	if got["init"] != "\x7fELF the guest agent" {
		t.Errorf("/init is %q", got["init"])
	}
}

func TestSecondBuildUsesTheCache(t *testing.T) {
	f := newFixture(t)
	first := f.build(t)
	// No tool is needed any more, not even the network's.
	b := f.builder()
	b.mmdebstrap = "/does/not/exist"
	second, err := b.build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !second.Cached || f.runs(t) != 1 {
		t.Errorf("cached=%v after %d runs of mmdebstrap", second.Cached, f.runs(t))
	}
	second.Cached = false
	if second != first {
		t.Errorf("second build is %+v, first was %+v", second, first)
	}
}

func TestNewEnvdKeepsThePackages(t *testing.T) {
	f := newFixture(t)
	first := f.build(t)
	f.write(t, "envd", "\x7fELF another agent", 0o755)
	second := f.build(t)
	if second.Digest == first.Digest {
		t.Error("another envd made the same digest")
	}
	if n := f.runs(t); n != 1 {
		t.Errorf("mmdebstrap ran %d times", n)
	}
	if got := debugfs(t, second.Rootfs, "cat /usr/local/bin/envd"); got != "\x7fELF another agent" {
		t.Errorf("envd in the image is %q", got)
	}
	if _, err := os.Stat(first.Rootfs); err != nil {
		t.Errorf("the first template is gone: %v", err)
	}
}

func TestRefreshFollowsTheMirror(t *testing.T) {
	f := newFixture(t)
	first := f.build(t)
	f.write(t, "out/packages", "bash 5.3 amd64\n", 0o644)
	f.o.Refresh = true
	second := f.build(t)
	if n := f.runs(t); n != 2 || second.Cached {
		t.Errorf("mmdebstrap ran %d times, cached=%v", n, second.Cached)
	}
	if second.Digest == first.Digest {
		t.Error("other packages made the same digest")
	}
	f.o.Refresh = false
	if third := f.build(t); third.Digest != second.Digest || !third.Cached {
		t.Errorf("after the refresh: %+v, want %s cached", third, second.Digest)
	}
	f.noRests(t)
}

func TestSameInputsMakeSameBytes(t *testing.T) {
	a, b := newFixture(t), newFixture(t)
	// Only the directories and the clock differ.
	ra := a.build(t)
	rb := b.build(t)
	if ra.Digest != rb.Digest {
		t.Errorf("digests differ: %s and %s", ra.Digest, rb.Digest)
	}
	for _, p := range [][2]string{{ra.Rootfs, rb.Rootfs}, {ra.Initrd, rb.Initrd}, {ra.Kernel, rb.Kernel}} {
		ta, errA := os.ReadFile(p[0])
		tb, errB := os.ReadFile(p[1])
		if err := errors.Join(errA, errB); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(ta, tb) {
			t.Errorf("%s differs between two builds", filepath.Base(p[0]))
		}
	}
	if got := debugfs(t, ra.Rootfs, "stat /etc/old"); !strings.Contains(got, " mtime: 0x3b9aca00:00000000") {
		t.Errorf("a package's file lost its time:\n%s", got)
	}
	if got := debugfs(t, ra.Rootfs, "stat /etc/new"); !strings.Contains(got, " mtime: 0x6483bd00:00000000") {
		t.Errorf("a file made by the build has not the epoch's time:\n%s", got)
	}
}

func TestTwoBuildsAtOnceBuildOnce(t *testing.T) {
	f := newFixture(t)
	f.script(t, "sleep 0.2")
	var wg sync.WaitGroup
	results := make([]Result, 3)
	errs := make([]error, 3)
	for i := range results {
		wg.Go(func() { results[i], errs[i] = f.builder().build(t.Context()) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if n := f.runs(t); n != 1 {
		t.Errorf("mmdebstrap ran %d times", n)
	}
	if results[0].Digest != results[1].Digest || results[1].Digest != results[2].Digest {
		t.Errorf("different digests: %+v", results)
	}
	f.noRests(t)
}

func TestWaitingForTheLockCanBeCancelled(t *testing.T) {
	dir := t.TempDir()
	held, err := lockDir(t.Context(), dir, func() {})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	ctx, cancel := context.WithCancel(t.Context())
	told := 0
	_, err = lockDir(ctx, dir, func() { told++; cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("waiting ended with %v", err)
	}
	if told != 1 {
		t.Errorf("waiting was told %d times", told)
	}
}

func TestDamagedCacheIsBuiltAgain(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(f *fixture, r Result) string // the file to damage
		runs   int
	}{
		{"kernel of the packages", func(f *fixture, _ Result) string { return f.packagesFile(t, kernelName) }, 2},
		{"disk of the packages", func(f *fixture, _ Result) string { return f.packagesFile(t, rootfsName) }, 2},
		{"description of the packages", func(f *fixture, _ Result) string { return f.packagesFile(t, metaName) }, 2},
		{"disk of the template", func(_ *fixture, r Result) string { return r.Rootfs }, 1},
		{"initrd of the template", func(_ *fixture, r Result) string { return r.Initrd }, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t)
			first := f.build(t)
			if err := os.Truncate(c.damage(f, first), 10); err != nil {
				t.Fatal(err)
			}
			second := f.build(t)
			if second != first {
				t.Errorf("built %+v, want %+v", second, first)
			}
			if n := f.runs(t); n != c.runs {
				t.Errorf("mmdebstrap ran %d times, want %d", n, c.runs)
			}
			if err := second.check(t); err != nil {
				t.Error(err)
			}
			f.noRests(t)
		})
	}
}

func (f *fixture) packagesFile(t *testing.T, name string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(f.o.Cache, "packages-*", name))
	if err != nil || len(found) != 1 {
		t.Fatalf("looking for %s: %v, %v", name, found, err)
	}
	return found[0]
}

func (r Result) check(t *testing.T) error {
	t.Helper()
	tool, err := findTool("e2fsck")
	if err != nil {
		return err
	}
	return ext4Tools{e2fsck: tool}.check(t.Context(), r.Rootfs)
}

func TestProgressIsOrderly(t *testing.T) {
	f := newFixture(t)
	var steps []string
	f.o.Progress = func(step string, done, total int64) {
		if total != 0 && done > total || done < 0 {
			t.Errorf("%s: %d of %d", step, done, total)
		}
		if len(steps) == 0 || steps[len(steps)-1] != step {
			steps = append(steps, step)
		}
	}
	f.build(t)
	want := []string{"starting mmdebstrap", "running apt-get update", "success", "making the disk image",
		"collecting the kernel", "syncing", "copying the disk image", "adding envd", "packing the initramfs", "syncing"}
	if !slices.Equal(steps, want) {
		t.Errorf("steps are %q, want %q", steps, want)
	}
}
