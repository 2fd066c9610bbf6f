package storagetest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// An S3Server is a running S3 service (versitygw, over a directory).
type S3Server struct {
	Endpoint             string
	AccessKey, SecretKey string
}

// serverModule has the server's version and dependencies, apart from ours.
const serverModule = "test/tools/s3server"

var buildServer = sync.OnceValues(func() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, serverModule, "go.mod")); err == nil {
			break
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no directory above has %s", serverModule)
		}
	}
	// Builds it at the first time, and prints the path in the build cache.
	cmd := exec.Command("go", "-C", filepath.Join(dir, serverModule), "tool", "-n", "versitygw")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build the S3 server: %w: %s", err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
})

// StartS3 starts a server that ends with the test. Building it at the first
// time takes about a minute; `make tools` does it ahead.
func StartS3(t testing.TB) S3Server {
	t.Helper()
	bin, err := buildServer()
	if err != nil {
		t.Fatal(err)
	}
	// Something may take the port between our look and the server's: then the
	// server ends at once, and we try again.
	for range 5 {
		s, err := startS3(t, bin)
		if err == nil {
			return s
		}
		t.Logf("S3 server: %v", err)
	}
	t.Fatal("the S3 server does not start")
	return S3Server{}
}

func startS3(t testing.TB, bin string) (S3Server, error) {
	// An address of this process's own: the test of another package, which runs
	// at the same time, cannot come to answer on the same port.
	pid := os.Getpid()
	host := net.IPv4(127, byte(64+pid>>16), byte(pid>>8), byte(pid))
	l, err := net.Listen("tcp", net.JoinHostPort(host.String(), "0"))
	if err != nil {
		return S3Server{}, err
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		return S3Server{}, err
	}
	dir := t.TempDir()
	data, meta := filepath.Join(dir, "data"), filepath.Join(dir, "meta")
	for _, d := range []string{data, meta} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return S3Server{}, err
		}
	}
	s := S3Server{Endpoint: "http://" + addr, AccessKey: "test-key", SecretKey: "test-secret-of-the-server"}
	var out bytes.Buffer
	cmd := exec.Command(bin, "--port", addr, "--access", s.AccessKey, "--secret", s.SecretKey, "--quiet",
		"--health", "/health", "posix", "--sidecar", meta, data)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = []string{"HOME=" + dir}
	if err := cmd.Start(); err != nil {
		return S3Server{}, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := awaitS3(s.Endpoint, ended); err != nil {
		_ = cmd.Process.Kill()
		return S3Server{}, fmt.Errorf("%w: %s", err, out.String())
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // its data goes with the test
		<-ended
	})
	return s, nil
}

// awaitS3 asks the server until it answers or ends.
func awaitS3(endpoint string, ended <-chan error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			return errors.Join(errors.New("it ended"), err)
		case <-tick.C:
		}
		resp, err := http.Get(endpoint + "/health")
		if err != nil {
			continue
		}
		if err := resp.Body.Close(); err != nil {
			return err
		}
		if resp.StatusCode == http.StatusOK {
			return nil
		}
	}
}
