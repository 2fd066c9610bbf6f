package sdk

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"git.omukk.dev/wrenn/sandbox/test/harness"
)

//go:embed requirements.txt package.json package-lock.json
var locks embed.FS

// SDKs are the locked versions, installed.
type SDKs struct{ Dir string }

// Python is the interpreter that has the Python SDK.
func (s SDKs) Python() string { return filepath.Join(s.Dir, "venv/bin/python") }

// Node is Node.js; the JavaScript SDK is in Dir.
func (s SDKs) Node() string { return filepath.Join(s.Dir, "venv/bin/node") }

// Install makes the directory that holds the locked versions, or finds it. A
// half-made one is made again.
func Install(ctx context.Context) (SDKs, error) {
	sum := sha256.New()
	files := []string{"requirements.txt", "package.json", "package-lock.json"}
	for _, f := range files {
		b, err := locks.ReadFile(f)
		if err != nil {
			return SDKs{}, err
		}
		fmt.Fprintf(sum, "%s %d\n%s", f, len(b), b)
	}
	root := filepath.Join(harness.DevDir(), "sdk")
	s := SDKs{filepath.Join(root, hex.EncodeToString(sum.Sum(nil)[:8]))}
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
	done := filepath.Join(s.Dir, "done")
	if _, err := os.Stat(done); err == nil {
		return s, nil
	}
	if err := os.RemoveAll(s.Dir); err != nil {
		return s, err
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return s, err
	}
	for _, f := range files {
		b, err := locks.ReadFile(f)
		if err != nil {
			return s, err
		}
		if err := os.WriteFile(filepath.Join(s.Dir, f), b, 0o644); err != nil {
			return s, err
		}
	}
	for _, args := range [][]string{
		{"/usr/bin/python3", "-m", "venv", "venv"},
		{"venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", "requirements.txt"},
		{"venv/bin/npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"},
	} {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir = s.Dir
		cmd.Env = append(os.Environ(), "PATH="+filepath.Join(s.Dir, "venv/bin")+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			return s, fmt.Errorf("%v: %w\n%s", args, err, out)
		}
	}
	return s, os.WriteFile(done, nil, 0o644)
}
