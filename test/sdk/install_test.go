package sdk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// sdks is where the SDKs are installed.
type sdks struct{ dir string }

func (s sdks) python() string { return filepath.Join(s.dir, "venv/bin/python") }
func (s sdks) node() string   { return filepath.Join(s.dir, "venv/bin/node") }

// install makes the directory that holds the locked versions, or finds it. A
// half-made one is made again.
func install(ctx context.Context) (sdks, error) {
	var sum []byte
	for _, f := range []string{"requirements.txt", "package.json", "package-lock.json"} {
		b, err := os.ReadFile(f)
		if err != nil {
			return sdks{}, err
		}
		h := sha256.Sum256(append(sum, b...))
		sum = h[:]
	}
	root := filepath.Join(harness.DevDir(), "sdk")
	s := sdks{filepath.Join(root, hex.EncodeToString(sum[:8]))}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return s, err
	}
	lock, err := os.OpenFile(filepath.Join(root, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return s, err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return s, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	done := filepath.Join(s.dir, "done")
	if _, err := os.Stat(done); err == nil {
		return s, nil
	}
	if err := os.RemoveAll(s.dir); err != nil {
		return s, err
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return s, err
	}
	for _, f := range []string{"package.json", "package-lock.json"} {
		b, err := os.ReadFile(f)
		if err != nil {
			return s, err
		}
		if err := os.WriteFile(filepath.Join(s.dir, f), b, 0o644); err != nil {
			return s, err
		}
	}
	here, err := os.Getwd()
	if err != nil {
		return s, err
	}
	for _, args := range [][]string{
		{"/usr/bin/python3", "-m", "venv", "venv"},
		{"venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", filepath.Join(here, "requirements.txt")},
		{"venv/bin/npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"},
	} {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir = s.dir
		cmd.Env = append(os.Environ(), "PATH="+filepath.Join(s.dir, "venv/bin")+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			return s, fmt.Errorf("%v: %w\n%s", args, err, out)
		}
	}
	return s, os.WriteFile(done, nil, 0o644)
}
