package sdk

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// domain is what the published ports of the tests' server lie below.
const domain = "wrenn.test"

var (
	server *harness.Server
	sdk    SDKs
	tlsAt  string // host:port of *.domain
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Println("skipped: these tests run VMs and need root")
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	var err error
	if sdk, err = Install(ctx); err != nil {
		fmt.Println("install the SDKs:", err)
		return 1
	}
	dir, err := os.MkdirTemp("/var/tmp", "wrenn-sdk-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer os.RemoveAll(dir)
	logFile, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	port, err := freePort()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	tlsAt = fmt.Sprintf("127.0.0.1:%d", port)
	server, err = harness.Start(ctx, harness.Options{
		Dir: filepath.Join(dir, "s"), Output: logFile,
		Args: []string{"--on-exit", "destroy", "-v", "--domain", domain, "--tls-listen", tlsAt},
	})
	if err != nil {
		fmt.Println("start wrenn up:", err)
		showLog(logFile.Name())
		return 1
	}
	code := m.Run()
	if err := server.Stop(); err != nil {
		fmt.Println("stop wrenn up:", err)
		code = 1
	}
	server.Wipe()
	if code != 0 {
		showLog(logFile.Name())
	}
	return code
}

// showLog prints the end of the server's log.
func showLog(path string) {
	b, _ := os.ReadFile(path)
	fmt.Printf("the end of the server's log:\n%s\n", b[max(0, len(b)-8000):])
}

// verdict is one check of a script.
type verdict struct {
	Name    string  `json:"name"`
	OK      bool    `json:"ok"`
	Why     string  `json:"why"`
	Seconds float64 `json:"seconds"`
}

// modeA is the environment with which an SDK finds the server by two URLs, over
// plain HTTP.
func modeA(t *testing.T) []string { return modeAOf(t, server) }

func modeAOf(t *testing.T, server *harness.Server) []string {
	t.Helper()
	key, err := os.ReadFile(filepath.Join(server.Dir, "api-key"))
	if err != nil {
		t.Fatal(err)
	}
	// The form that older SDKs ask for.
	e2bKey := "e2b_" + strings.TrimPrefix(strings.TrimSpace(string(key)), "wrn_")
	return []string{"E2B_API_URL=" + server.URL + "/e2b", "E2B_SANDBOX_URL=" + server.URL, "E2B_API_KEY=" + e2bKey}
}

// script runs one and makes a subtest of each of its checks.
func script(t *testing.T, env []string, program string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(cleanEnv(), env...)
	var other bytes.Buffer
	cmd.Stderr = &other
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	checks := 0
	lines := bufio.NewScanner(stdout)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		text, ok := strings.CutPrefix(lines.Text(), "CHECK ")
		if !ok {
			fmt.Fprintln(&other, lines.Text())
			continue
		}
		var v verdict
		if err := json.Unmarshal([]byte(text), &v); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		checks++
		t.Run(v.Name, func(t *testing.T) {
			t.Logf("%.1f s", v.Seconds)
			if !v.OK {
				t.Error(v.Why)
			}
		})
	}
	if err := cmd.Wait(); err != nil || checks == 0 {
		t.Errorf("%d checks, %v\n%s", checks, err, other.Bytes())
	}
}

// cleanEnv is ours without what would lead an SDK elsewhere.
func cleanEnv() []string {
	var out []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(name, "E2B_") && !strings.HasSuffix(strings.ToLower(name), "_proxy") {
			out = append(out, kv)
		}
	}
	// The SDKs of the JavaScript scripts are not beside them.
	return append(out, "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1", "WRENN_SDK_DIR="+sdk.Dir)
}

// published is the domain with the port of the TLS listener.
func published() string {
	_, port, _ := strings.Cut(tlsAt, ":")
	return domain + ":" + port
}
