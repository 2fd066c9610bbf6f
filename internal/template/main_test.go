package template

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"
)

// helperDir makes the test binary run one build in the directory it names, so
// that a test can kill it.
const helperDir = "TEMPLATE_TEST_BUILD_IN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(helperDir); dir != "" {
		_, err := fixtureAt(dir).builder().build(context.Background())
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// fixture is a build of a tiny root file system: mmdebstrap is a script, all
// else is real.
type fixture struct {
	dir string
	o   Options
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("building needs root: the files of a root file system belong to root")
	}
	f := fixtureAt(t.TempDir())
	f.write(t, "envd", "\x7fELF the guest agent", 0o755)
	f.script(t, "")
	f.kernelFiles(t)
	return f
}

func fixtureAt(dir string) *fixture {
	return &fixture{dir: dir, o: Options{
		Dir: filepath.Join(dir, "base"), Cache: filepath.Join(dir, "cache"),
		EnvdPath: filepath.Join(dir, "envd"), DiskSizeBytes: minDisk,
		Sources: "deb http://mirror.invalid/debian bookworm main\n",
	}}
}

func (f *fixture) builder() *builder {
	b, err := newBuilder(f.o)
	if err != nil {
		panic(err)
	}
	b.mmdebstrap = filepath.Join(f.dir, "mmdebstrap")
	b.space = 1 << 20
	return b
}

func (f *fixture) write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// script writes the stand-in for mmdebstrap. It counts its runs, then runs
// extra, then makes a root file system and what customize.sh puts out.
func (f *fixture) script(t *testing.T, extra string) {
	t.Helper()
	f.write(t, "mmdebstrap", `#!/bin/sh
set -eu
shift $(($# - 3))
root=$2
fixture=`+f.dir+`
echo run >>$fixture/runs
echo "I: running apt-get update..." >&2
`+extra+`
mkdir -p $root/var/lib/apt/lists/partial
echo list >$root/var/lib/apt/lists/mirror_Packages
mkdir -p $root/etc $root/usr/local/bin $root/usr/sbin $root/home/user $root/var/cache/apt
echo old >$root/etc/old; touch -d @1000000000 $root/etc/old
echo new >$root/etc/new
echo $$ >$root/var/cache/apt/pkgcache.bin
chown 1000:1000 $root/home/user
ln -s /usr/local/bin/envd $root/usr/sbin/init
cp -r $fixture/out/. "$WRENN_OUT/"
echo "I: success" >&2
`, 0o755)
}

const testKernel = "6.1.0-99-cloud-amd64"

// kernelFiles makes what the hook takes out of the kernel package, one module of
// it compressed.
func (f *fixture) kernelFiles(t *testing.T) {
	t.Helper()
	f.write(t, "out/version", testKernel+"\n", 0o644)
	f.write(t, "out/vmlinuz", "kernel image", 0o644)
	f.write(t, "out/packages", "bash 5.2 amd64\n", 0o644)
	f.write(t, "out/modules.builtin", "kernel/drivers/virtio/virtio_ring.ko\n", 0o644)
	f.write(t, "out/modules.dep", strings.Join([]string{
		"kernel/v/virtio.ko:",
		"kernel/v/virtio_mmio.ko: kernel/v/virtio.ko",
		"kernel/v/virtio_pci_modern_dev.ko:",
		"kernel/v/virtio_pci.ko: kernel/v/virtio_pci_modern_dev.ko kernel/v/virtio.ko",
		"kernel/b/virtio_blk.ko: kernel/v/virtio.ko",
		"kernel/n/virtio_net.ko.xz: kernel/n/net_failover.ko kernel/n/failover.ko kernel/v/virtio.ko",
		"kernel/n/net_failover.ko: kernel/n/failover.ko",
		"kernel/n/failover.ko:",
		"kernel/n/inet_diag.ko:",
		"kernel/n/tcp_diag.ko: kernel/n/inet_diag.ko",
	}, "\n")+"\n", 0o644)
	tree := "out/kernel/lib/modules/" + testKernel + "/kernel/"
	for _, m := range []string{"v/virtio", "v/virtio_mmio", "v/virtio_pci_modern_dev", "v/virtio_pci", "b/virtio_blk", "n/net_failover", "n/failover", "n/inet_diag", "n/tcp_diag"} {
		f.write(t, tree+m+".ko", "\x7fELF "+m, 0o644)
	}
	f.write(t, tree+"n/virtio_net.ko.xz", compressXZ(t, "\x7fELF n/virtio_net"), 0o644)
}

func compressXZ(t *testing.T, text string) string {
	t.Helper()
	var b bytes.Buffer
	w, err := xz.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// runs is how often the stand-in for mmdebstrap ran.
func (f *fixture) runs(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(f.dir, "runs"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Count(string(text), "run")
}

// build builds and fails the test if that fails.
func (f *fixture) build(t *testing.T) Result {
	t.Helper()
	r, err := f.builder().build(t.Context())
	if err != nil {
		t.Fatalf("build: %v", err)
	}
	return r
}

// noRests fails the test if a build left anything half made.
func (f *fixture) noRests(t *testing.T) {
	t.Helper()
	for _, dir := range []string{f.o.Dir, f.o.Cache} {
		rests, err := filepath.Glob(filepath.Join(dir, tmpPrefix+"*"))
		if err != nil {
			t.Fatal(err)
		}
		if len(rests) > 0 {
			t.Errorf("left behind: %v", rests)
		}
	}
}
