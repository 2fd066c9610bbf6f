package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/client/clienttest"
)

var update = flag.Bool("update", false, "rewrite the transcripts in testdata")

// asWrenn makes the test binary be wrenn, for tests that need a process.
const asWrenn = "WRENN_TEST_AS_WRENN"

func TestMain(m *testing.M) {
	if os.Getenv(asWrenn) != "" {
		main()
	}
	os.Exit(m.Run())
}

// startServer starts the imitation of the API and points the environment at it.
func startServer(t *testing.T) *clienttest.Server {
	t.Helper()
	s := clienttest.New()
	t.Cleanup(s.Close)
	t.Setenv("WRENN_URL", s.URL)
	t.Setenv("WRENN_API_KEY", clienttest.Key)
	return s
}

type result struct {
	code           int
	stdout, stderr string
}

func wrennIn(t *testing.T, stdin io.Reader, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), args, stdin, &stdout, &stderr)
	return result{code, stdout.String(), stderr.String()}
}

func wrenn(t *testing.T, args ...string) result {
	t.Helper()
	return wrennIn(t, strings.NewReader(""), args...)
}

// want checks the exit code and a part of standard error.
func (r result) want(t *testing.T, code int, stderr string) {
	t.Helper()
	if r.code != code || !strings.Contains(r.stderr, stderr) || (stderr == "" && r.stderr != "") {
		t.Errorf("exit code %d, stderr %q; want %d, %q", r.code, r.stderr, code, stderr)
	}
}

// TestTranscripts runs the commands of testdata/*.txt ("$ wrenn …", words
// split at spaces) and compares all they print and their exit codes.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, name := range files {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			s := startServer(t)
			s.PageSize = 2
			var got strings.Builder
			for line := range strings.Lines(string(want)) {
				line = strings.TrimSuffix(line, "\n")
				if strings.HasPrefix(line, "# ") {
					fmt.Fprintln(&got, line)
				}
				command, ok := strings.CutPrefix(line, "$ wrenn ")
				if !ok {
					continue
				}
				r := wrenn(t, strings.Fields(command)...)
				fmt.Fprintf(&got, "%s\n%s", line, r.stdout)
				for l := range strings.Lines(r.stderr) {
					fmt.Fprintf(&got, "stderr: %s", l)
				}
				if r.code != 0 {
					fmt.Fprintf(&got, "exit code: %d\n", r.code)
				}
				got.WriteString("\n")
			}
			text := strings.ReplaceAll(got.String(), s.URL, "$WRENN_URL")
			if *update {
				if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if d := cmp.Diff(string(want), text); d != "" {
				t.Errorf("-want +got (go test -update rewrites):\n%s", d)
			}
		})
	}
}

// The exit codes of the root command's help, one by one.
func TestExitCodes(t *testing.T) {
	s := startServer(t)
	sb := s.Add(client.Sandbox{})
	paused := s.Add(client.Sandbox{Status: client.StatusPaused})
	t.Run("of the command line", func(t *testing.T) {
		for _, tc := range []struct {
			args   string
			code   int
			stderr string
		}{
			{"sandbox list", 0, ""},
			{"nonsense", 2, `unknown command "nonsense"`},
			{"sandbox creat", 2, "did you mean create?"},
			{"sandbox list extra", 2, "usage: wrenn sandbox list"},
			{"sandbox list --nonsense", 2, "see: wrenn sandbox list --help"},
			{"sandbox get", 2, "accepts 1 arg"},
			{"sandbox get UPPER", 2, "sandbox id"},
			{"sandbox rm", 2, "requires at least 1 arg"},
			{"sandbox create -m novalue", 2, "want KEY=VALUE"},
			{"sandbox create -m =v", 2, "want KEY=VALUE"},
			{"sandbox create -m a=1 -m a=2", 2, "given twice"},
			{"sandbox create --timeout 5", 2, "missing unit"},
			{"sandbox create --timeout 1500ms", 2, "whole seconds"},
			{"sandbox create --vcpus two", 2, "invalid argument"},
			{"sandbox timeout sb1 soon", 2, "want a number with a unit"},
			{"sandbox timeout sb1 -- -5s", 2, "whole seconds"},
			{"sandbox fork sb1 -n 0", 2, "at least 1"},
			{"sandbox get nobody", 3, "wrenn sandbox list"},
			{"sandbox create nothing", 3, "no template nothing"},
			{"snapshot get nothing", 3, "not_found"},
			{"snapshot create sb1 base", 4, "is taken"},
			{"sandbox resume sb1", 4, "it must be paused"},
			{"sandbox exec sb1 exit 0", 0, ""},
			{"sandbox exec sb1 exit 77", 77, ""},
			{"sandbox exec sb1 exit 300", 255, ""},
			{"sandbox exec sb1 exit -1", 255, ""},
			{"sandbox exec nobody echo", 125, "not_found"},
			{"sandbox exec " + paused.ID + " echo", 125, "wrenn sandbox resume"},
			{"sandbox exec --nonsense", 125, "unknown flag"},
			{"sandbox exec sb1", 125, "usage"},
			{"sandbox exec sb1 --", 125, "no COMMAND"},
			{"sandbox exec -i -n sb1 echo", 125, "none of the others"},
			{"sandbox exec sb1 drop", 125, "the stream broke"},
			{"sandbox exec sb1 refuse", 125, "no such user"},
			{"sandbox exec --json sb1 exit 9", 9, ""},
			{"sandbox shell sb1", 125, "not a terminal"},
		} {
			t.Run(tc.args, func(t *testing.T) {
				wrenn(t, strings.Fields(tc.args)...).want(t, tc.code, tc.stderr)
			})
		}
	})
	t.Run("of the server", func(t *testing.T) {
		for code, want := range map[string]int{
			client.CodeInvalidRequest: 2, client.CodeNotFound: 3, client.CodeConflict: 4, client.CodeInvalidState: 4,
			client.CodeUnauthorized: 5, client.CodeHostUnavailable: 6, client.CodeInternal: 1, client.CodeTooLarge: 1,
		} {
			s.Fail = func(*http.Request) *client.Error { return &client.Error{Status: 400, Code: code, Message: "because"} }
			wrenn(t, "sandbox", "get", sb.ID).want(t, want, "because")
			wrenn(t, "sandbox", "exec", sb.ID, "x").want(t, 125, "because")
		}
	})
}

func TestNoServer(t *testing.T) {
	s := startServer(t)
	s.Close()
	for _, args := range [][]string{{"sandbox", "list"}, {"sandbox", "rm", "a", "b"}, {"snapshot", "create", "a", "b"}} {
		r := wrenn(t, args...)
		r.want(t, 6, "start it with: wrenn up")
		if !strings.Contains(r.stderr, "no server answers at "+s.URL) || strings.Count(r.stderr, "no server") != 1 {
			t.Errorf("stderr %q does not name the server, once", r.stderr)
		}
	}
	wrenn(t, "sandbox", "exec", "a", "b").want(t, 125, "start it with: wrenn up")
	t.Setenv("WRENN_URL", "127.0.0.1:8000")
	wrenn(t, "sandbox", "list").want(t, 2, "WRENN_URL")
}

func TestBrokenConnection(t *testing.T) {
	s := startServer(t)
	s.Fail = func(*http.Request) *client.Error { panic(http.ErrAbortHandler) }
	wrenn(t, "sandbox", "pause", "a").want(t, 1, "what the server had accepted it goes on with")
}

func TestAPIKey(t *testing.T) {
	startServer(t)
	dir := t.TempDir()
	t.Setenv("WRENN_API_KEY", "")
	t.Setenv("WRENN_DIR", dir)
	file := filepath.Join(dir, "api-key")
	wrenn(t, "sandbox", "list").want(t, 5, file+" does not exist")
	if err := os.WriteFile(file, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	wrenn(t, "sandbox", "list").want(t, 5, file+" is empty")
	if err := os.WriteFile(file, []byte(clienttest.Key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	wrenn(t, "sandbox", "list").want(t, 0, "")
	if err := os.WriteFile(file, []byte("wrn_other"), 0o600); err != nil {
		t.Fatal(err)
	}
	wrenn(t, "sandbox", "list").want(t, 5, "the key comes from "+file)
	t.Setenv("WRENN_API_KEY", "wrn_secret")
	r := wrenn(t, "sandbox", "list")
	r.want(t, 5, "the key comes from WRENN_API_KEY")
	if strings.Contains(r.stderr, "wrn_secret") {
		t.Errorf("the key is told: %q", r.stderr)
	}
}

// Text that others chose must not steer the terminal.
func TestOutputIsPrintable(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{Status: client.StatusError, Error: "\x1b]0;title\a bad\nline", Metadata: map[string]string{"k": "\x1b[2Jü"}})
	for _, args := range [][]string{{"sandbox", "list"}, {"sandbox", "get", "sb1"}} {
		r := wrenn(t, args...)
		if strings.ContainsAny(r.stdout, "\x1b\a") || !strings.Contains(r.stdout, "ü") {
			t.Errorf("%v printed %q", args, r.stdout)
		}
	}
	s.Fail = func(*http.Request) *client.Error {
		return &client.Error{Status: 404, Code: client.CodeNotFound, Message: "\x1b[31mred"}
	}
	if r := wrenn(t, "sandbox", "list"); strings.Contains(r.stderr, "\x1b") {
		t.Errorf("stderr %q", r.stderr)
	}
}

func TestExecStreams(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	in := strings.Repeat("line\xff\n", 50_000)
	r := wrennIn(t, strings.NewReader(in), "sandbox", "exec", "sb1", "--", "cat", "-n", "--json")
	if r.want(t, 0, ""); r.stdout != in {
		t.Errorf("%d bytes came back, not the same %d", len(r.stdout), len(in))
	}
	if r := wrennIn(t, strings.NewReader(in), "sandbox", "exec", "-n", "sb1", "cat"); r.stdout != "" {
		t.Errorf("-n sent %d bytes", len(r.stdout))
	}
	r = wrenn(t, "sandbox", "exec", "sb1", "err", "oops")
	if r.want(t, 0, "oops\n"); r.stdout != "" {
		t.Errorf("stdout %q", r.stdout)
	}
	for args, want := range map[string]string{
		"-e A=1 -e B=a=b sb1 env B": "a=b\n",
		"-w /tmp sb1 pwd":           "/tmp\n",
		"-u root sb1 whoami":        "root\n",
		"sb1 echo -- x":             "-- x\n",
	} {
		if r := wrenn(t, append([]string{"sandbox", "exec"}, strings.Fields(args)...)...); r.stdout != want {
			t.Errorf("exec %s printed %q %q, want %q", args, r.stdout, r.stderr, want)
		}
	}
	r = wrennIn(t, strings.NewReader("in"), "sandbox", "exec", "--json", "-i", "sb1", "cat")
	if r.want(t, 0, ""); !strings.Contains(r.stdout, `"stdout": "in"`) || !strings.Contains(r.stdout, `"exit_code": 0`) {
		t.Errorf("--json printed %s", r.stdout)
	}
	big := io.LimitReader(zeros{}, maxJSONStdin+1)
	wrennIn(t, big, "sandbox", "exec", "--json", "-i", "sb1", "cat").want(t, 125, "leave --json out")
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestCompletion(t *testing.T) {
	s := startServer(t)
	s.Add(client.Sandbox{})
	s.Add(client.Sandbox{Status: client.StatusPaused})
	for args, want := range map[string]string{
		"sandbox get":               "sb1 sb2",
		"sandbox rm sb1":            "sb2",
		"sandbox get sb1":           "",
		"sandbox exec":              "sb1",
		"sandbox resume":            "sb2",
		"sandbox create":            "base",
		"snapshot rm":               "",
		"template rm":               "base",
		"sandbox list --status=pau": "",
	} {
		r := wrenn(t, append(append([]string{"__complete"}, strings.Fields(args)...), "")...)
		var got []string
		for l := range strings.Lines(r.stdout) {
			if name, _, _ := strings.Cut(strings.TrimSpace(l), "\t"); !strings.HasPrefix(name, ":") {
				got = append(got, name)
			}
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%s: %q, want %q", args, g, want)
		}
	}
	if r := wrenn(t, "completion", "bash"); r.code != 0 || !strings.Contains(r.stdout, "wrenn") {
		t.Errorf("completion bash: %d", r.code)
	}
	s.Close()
	if r := wrenn(t, "__complete", "sandbox", "get", ""); strings.Contains(r.stdout, "sb") {
		t.Errorf("without a server: %q", r.stdout)
	}
	// One that takes connections and answers none is not waited for.
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	t.Setenv("WRENN_URL", "http://"+silent.Addr().String())
	if r := wrenn(t, "__complete", "sandbox", "get", ""); strings.Contains(r.stdout, "sb") {
		t.Errorf("with a silent server: %q", r.stdout)
	}
}

func TestVersion(t *testing.T) {
	t.Setenv("WRENN_URL", "nonsense") // it needs no server
	if r := wrenn(t, "version"); r.code != 0 || !strings.HasPrefix(r.stdout, "wrenn ") {
		t.Errorf("version: %+v", r)
	}
	if r := wrenn(t, "version", "-q"); r.stdout != version()+"\n" || version() == "" {
		t.Errorf("version -q: %+v", r)
	}
	if r := wrenn(t, "version", "--json"); !strings.Contains(r.stdout, `"version": "`+version()+`"`) {
		t.Errorf("version --json: %+v", r)
	}
}

// The help and docs/cli.md must tell the same exit codes, and every command
// must be in the document.
func TestDocumentIsComplete(t *testing.T) {
	doc, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, code := range regexp.MustCompile(`(?m)^  (\d+) `).FindAllStringSubmatch(rootLong, -1) {
		if !strings.Contains(string(doc), "| "+code[1]+" |") {
			t.Errorf("docs/cli.md does not tell exit code %s", code[1])
		}
	}
	for _, group := range []func() []string{
		func() (p []string) {
			for _, c := range newSandboxCmd().Commands() {
				p = append(p, "sandbox "+c.Name())
			}
			return
		},
		func() (p []string) {
			for _, c := range newSnapshotCmd().Commands() {
				p = append(p, "snapshot "+c.Name())
			}
			return
		},
		func() (p []string) {
			for _, c := range newTemplateCmd().Commands() {
				p = append(p, "template "+c.Name())
			}
			return
		},
	} {
		for _, c := range group() {
			if !strings.Contains(string(doc), "`wrenn "+c) {
				t.Errorf("docs/cli.md does not tell of wrenn %s", c)
			}
		}
	}
}
