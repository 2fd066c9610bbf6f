package mcpserver

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/client/clienttest"
)

// start gives an imitation of the Wrenn server and an MCP session that reaches
// it through ours.
func start(t *testing.T) (*clienttest.Server, *mcp.ClientSession) {
	t.Helper()
	api := clienttest.New()
	t.Cleanup(api.Close)
	c, err := client.New(client.Options{BaseURL: api.URL, APIKey: clienttest.Key})
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := mcp.NewInMemoryTransports()
	ss, err := New(Options{Client: c, Version: "test"}).Connect(t.Context(), ours, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ss.Wait() })
	return api, session(t, theirs)
}

func session(t *testing.T, tr mcp.Transport) *mcp.ClientSession {
	t.Helper()
	cs, err := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "0"}, nil).Connect(t.Context(), tr, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cs.Close() })
	return cs
}

type args = map[string]any

// call calls a tool and decodes its answer; a tool error comes back as text.
func call[Out any](t *testing.T, cs *mcp.ClientSession, tool string, in args) (out Out, refusal string) {
	t.Helper()
	res, err := cs.CallTool(t.Context(), &mcp.CallToolParams{Name: tool, Arguments: in})
	if err != nil {
		t.Fatalf("%s: a protocol error: %v", tool, err)
	}
	text := res.Content[0].(*mcp.TextContent).Text
	if res.IsError {
		return out, text
	}
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatalf("%s answered %q: %v", tool, text, err)
	}
	structured, err := json.Marshal(res.StructuredContent)
	if err != nil {
		t.Fatal(err)
	}
	var a, b any
	if json.Unmarshal(structured, &a) != nil || json.Unmarshal([]byte(text), &b) != nil || !jsonEqual(a, b) {
		t.Errorf("%s: text %s and structured content %s differ", tool, text, structured)
	}
	return out, ""
}

func jsonEqual(a, b any) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return string(x) == string(y)
}

// must is call where a refusal is a failure.
func must[Out any](t *testing.T, cs *mcp.ClientSession, tool string, in args) Out {
	t.Helper()
	out, refusal := call[Out](t, cs, tool, in)
	if refusal != "" {
		t.Fatalf("%s %v: %s", tool, in, refusal)
	}
	return out
}

func TestToolsTellWhatTheyDo(t *testing.T) {
	_, cs := start(t)
	res, err := cs.ListTools(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, tool := range res.Tools {
		names = append(names, tool.Name)
		if len(tool.Description) < 20 || tool.Annotations == nil || tool.OutputSchema == nil {
			t.Errorf("%s: description %q, hints %v, output schema %v", tool.Name, tool.Description, tool.Annotations, tool.OutputSchema)
		}
		schema, _ := json.Marshal(tool.InputSchema)
		var in struct {
			Type                 string
			Required             []string
			Properties           map[string]struct{ Description string }
			AdditionalProperties any
		}
		if err := json.Unmarshal(schema, &in); err != nil || in.Type != "object" {
			t.Errorf("%s: schema %s", tool.Name, schema)
		}
		for p, v := range in.Properties {
			if v.Description == "" && p != "content" {
				t.Errorf("%s: the parameter %s has no description", tool.Name, p)
			}
		}
		if _, ok := in.Properties["sandbox_id"]; ok && !slices.Contains(in.Required, "sandbox_id") {
			t.Errorf("%s: sandbox_id is not required", tool.Name)
		}
	}
	slices.Sort(names)
	want := []string{"create_from_snapshot", "create_sandbox", "delete_snapshot", "destroy_sandbox", "get_sandbox",
		"list_files", "list_sandboxes", "list_snapshots", "pause_sandbox", "read_file", "resume_sandbox",
		"run_command", "run_python", "set_timeout", "snapshot_sandbox", "write_file"}
	if !slices.Equal(names, want) {
		t.Errorf("tools %v, want %v", names, want)
	}
}

func TestLifeCycle(t *testing.T) {
	_, cs := start(t)
	sb := must[sandbox](t, cs, "create_sandbox", args{"vcpus": 1, "memory_mb": 256, "metadata": args{"task": "a"}})
	if sb.ID == "" || sb.Status != "running" || sb.MemoryMB != 256 || !sb.AutoPause || sb.ExpiresAt.Sub(clienttest.Epoch) < defaultTimeout*time.Second {
		t.Fatalf("created %+v", sb)
	}
	if got := must[sandbox](t, cs, "create_sandbox", args{"timeout_sec": 0, "auto_pause": false}); got.AutoPause || !got.ExpiresAt.IsZero() {
		t.Errorf("without a limit: %+v", got)
	}
	id := args{"sandbox_id": sb.ID}
	if got := must[sandbox](t, cs, "pause_sandbox", id); got.Status != "paused" {
		t.Errorf("paused: %+v", got)
	}
	if got := must[sandbox](t, cs, "resume_sandbox", id); got.Status != "running" {
		t.Errorf("resumed: %+v", got)
	}
	if got := must[sandbox](t, cs, "set_timeout", args{"sandbox_id": sb.ID, "timeout_sec": 0}); !got.ExpiresAt.IsZero() {
		t.Errorf("limit taken away: %+v", got)
	}
	sn := must[client.Snapshot](t, cs, "snapshot_sandbox", args{"sandbox_id": sb.ID, "name": "ready"})
	clone := must[sandbox](t, cs, "create_from_snapshot", args{"snapshot": sn.Name})
	if clone.Template != "ready" || clone.ID == sb.ID {
		t.Errorf("clone: %+v", clone)
	}
	if got := must[snapshotsOutput](t, cs, "list_snapshots", nil); len(got.Snapshots) != 2 || got.More {
		t.Errorf("snapshots: %+v", got)
	}
	if got := must[listOutput](t, cs, "list_sandboxes", args{"metadata": args{"task": "a"}}); len(got.Sandboxes) != 1 || got.Sandboxes[0].ID != sb.ID {
		t.Errorf("list by metadata: %+v", got)
	}
	if got := must[listOutput](t, cs, "list_sandboxes", args{"limit": 2}); len(got.Sandboxes) != 2 || !got.More {
		t.Errorf("list of two: %+v", got)
	}
	must[deletedOutput](t, cs, "delete_snapshot", args{"name": "ready"})
	must[destroyOutput](t, cs, "destroy_sandbox", id)
	if _, refusal := call[sandbox](t, cs, "get_sandbox", id); !strings.Contains(refusal, "not_found") || !strings.Contains(refusal, "list_sandboxes") {
		t.Errorf("get of what is destroyed: %q", refusal)
	}
}

func TestCommands(t *testing.T) {
	api, cs := start(t)
	id := api.Add(client.Sandbox{}).ID
	run := func(in args) commandOutput {
		t.Helper()
		in["sandbox_id"] = id
		return must[commandOutput](t, cs, "run_command", in)
	}
	if got := run(args{"command": "echo a b"}); got.Stdout != "a b\n" || got.ExitCode != 0 || got.Truncated {
		t.Errorf("echo: %+v", got)
	}
	if got := run(args{"command": "err oh"}); got.Stderr != "oh\n" {
		t.Errorf("err: %+v", got)
	}
	if got := run(args{"command": "exit 3"}); got.ExitCode != 3 {
		t.Errorf("exit: %+v", got)
	}
	if got := run(args{"command": "cat", "stdin": "input"}); got.Stdout != "input" {
		t.Errorf("cat: %+v", got)
	}
	if got := run(args{"command": "pwd", "cwd": "/tmp"}); got.Stdout != "/tmp\n" {
		t.Errorf("pwd: %+v", got)
	}
	if got := run(args{"command": "whoami", "user": "root"}); got.Stdout != "root\n" {
		t.Errorf("whoami: %+v", got)
	}
	if got := run(args{"command": "env K", "envs": args{"K": "v"}}); got.Stdout != "v\n" {
		t.Errorf("env: %+v", got)
	}
	if got := run(args{"command": "binary"}); got.Stdout != "\uFFFD\x00\uFFFDx" {
		t.Errorf("binary: %q", got.Stdout)
	}
	if got := run(args{"command": "limit"}); !got.TimedOut || !strings.Contains(got.Stderr, "timeout_sec") {
		t.Errorf("limit: %+v", got)
	}
	got := run(args{"command": "yes 5000", "max_output": 300})
	if !got.Truncated || len(got.Stdout) > 350 || !strings.HasPrefix(got.Stdout, "line 0\n") || !strings.HasSuffix(got.Stdout, "line 4999\n") {
		t.Errorf("long output: %+v", got)
	}
	py := must[commandOutput](t, cs, "run_python", args{"sandbox_id": id, "code": "print(1)"})
	if py.Stdout != "print(1)\n" { // the imitation prints the program it was given
		t.Errorf("python: %+v", py)
	}
}

// A call that its caller cancels must not leave the command running.
func TestCancelledCommandIsStopped(t *testing.T) {
	api, cs := start(t)
	id := api.Add(client.Sandbox{}).ID
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := cs.CallTool(ctx, &mcp.CallToolParams{Name: "run_command", Arguments: args{"sandbox_id": id, "command": "wait"}})
		done <- err
	}()
	if !api.Wait("start /bin/bash -l -c wait", 10*time.Second) {
		t.Fatalf("the command was not started: %v", api.Log())
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("a cancelled call succeeded")
	}
	if !api.Wait("stop", 10*time.Second) {
		t.Errorf("the command was not stopped: %v", api.Log())
	}
}

func TestFiles(t *testing.T) {
	api, cs := start(t)
	id := api.Add(client.Sandbox{}).ID
	must[writeOutput](t, cs, "write_file", args{"sandbox_id": id, "path": "/w/a.txt", "content": "grüße", "mode": "755"})
	if got, mode, _ := api.Content(id, "/w/a.txt"); got != "grüße" || mode != 0o755 {
		t.Errorf("the sandbox has %q, %o", got, mode)
	}
	r := must[readOutput](t, cs, "read_file", args{"sandbox_id": id, "path": "/w/a.txt"})
	if r.Content != "grüße" || r.Encoding != "utf-8" || r.Size != 7 || r.NextOffset != 0 {
		t.Errorf("read: %+v", r)
	}
	// Cut in the middle of the ü: the part before it stays text.
	r = must[readOutput](t, cs, "read_file", args{"sandbox_id": id, "path": "/w/a.txt", "max_bytes": 3})
	if r.Content != "gr" || r.Encoding != "utf-8" || r.NextOffset != 2 {
		t.Errorf("read a part: %+v", r)
	}
	r = must[readOutput](t, cs, "read_file", args{"sandbox_id": id, "path": "/w/a.txt", "offset": r.NextOffset})
	if r.Content != "üße" {
		t.Errorf("read the rest: %+v", r)
	}
	bin := []byte{0, 0xff, 1}
	must[writeOutput](t, cs, "write_file", args{"sandbox_id": id, "path": "/w/b", "content": base64.StdEncoding.EncodeToString(bin), "encoding": "base64"})
	r = must[readOutput](t, cs, "read_file", args{"sandbox_id": id, "path": "/w/b"})
	if got, err := base64.StdEncoding.DecodeString(r.Content); err != nil || string(got) != string(bin) || r.Encoding != "base64" {
		t.Errorf("read bytes: %+v", r)
	}
	// A file of any size costs what is asked for.
	r = must[readOutput](t, cs, "read_file", args{"sandbox_id": id, "path": "/big/9999999999", "max_bytes": 10})
	if len(r.Content) != 10 || r.Size != 9999999999 || r.NextOffset != 10 {
		t.Errorf("read of a big file: %+v", r)
	}
	l := must[listFilesOutput](t, cs, "list_files", args{"sandbox_id": id, "path": "/w"})
	if len(l.Entries) != 2 || l.Entries[0].Path != "/w/a.txt" || l.Entries[0].Mode != "0755" || l.LeftOut != 0 {
		t.Errorf("list: %+v", l)
	}
	name := strings.Repeat("n", 200)
	for i := range maxEntries + 5 {
		api.Put(id, "/many/"+name+strings.Repeat("x", i%50)+string(rune('a'+i%26))+time.Duration(i).String(), "", 0o644)
	}
	l = must[listFilesOutput](t, cs, "list_files", args{"sandbox_id": id, "path": "/many"})
	if len(l.Entries)+l.LeftOut != maxEntries+5 || len(l.Entries) > 700 {
		t.Errorf("list of many: %d and %d left out", len(l.Entries), l.LeftOut)
	}
}

func TestRefusalsNameTheFieldOrTheRemedy(t *testing.T) {
	api, cs := start(t)
	id := api.Add(client.Sandbox{}).ID
	paused := api.Add(client.Sandbox{Status: client.StatusPaused}).ID
	api.Put(id, "/f", "abc", 0o644)
	for _, tc := range []struct {
		tool string
		in   args
		want string
	}{
		{"create_sandbox", args{"template": "none"}, "list_snapshots"},
		{"create_sandbox", args{"template": "../x"}, "name"},
		{"create_sandbox", args{"memory": 1}, "memory"},
		{"create_sandbox", args{"memory_mb": "many"}, "memory_mb"},
		{"create_from_snapshot", args{}, "snapshot"},
		{"get_sandbox", args{}, "sandbox_id"},
		{"destroy_sandbox", args{"sandbox_id": ""}, "sandbox id"},
		{"destroy_sandbox", args{"sandbox_id": "../" + id}, "sandbox id"},
		{"pause_sandbox", args{"sandbox_id": paused}, "get_sandbox"},
		{"set_timeout", args{"sandbox_id": id, "timeout_sec": -1}, "timeout"},
		{"list_sandboxes", args{"limit": 100000}, "limit"},
		{"list_snapshots", args{"limit": -1}, "limit"},
		{"snapshot_sandbox", args{"sandbox_id": id, "name": "Bad Name"}, "snapshot name"},
		{"snapshot_sandbox", args{"sandbox_id": id, "name": "base"}, "another name"},
		{"delete_snapshot", args{"name": "none"}, "list_snapshots"},
		{"run_command", args{"sandbox_id": id, "command": " "}, "command"},
		{"run_command", args{"sandbox_id": paused, "command": "echo"}, "resume_sandbox"},
		{"run_command", args{"sandbox_id": id, "command": "echo", "timeout_sec": -1}, "timeout_sec"},
		{"run_command", args{"sandbox_id": id, "command": "echo", "timeout_sec": 90000}, "background"},
		{"run_command", args{"sandbox_id": id, "command": "echo", "max_output": 1 << 30}, "max_output"},
		{"run_python", args{"sandbox_id": id, "code": ""}, "code"},
		{"run_python", args{"sandbox_id": id, "code": strings.Repeat("#", maxCode+1)}, "write_file"},
		{"read_file", args{"sandbox_id": id, "path": "/none"}, "list_files"},
		{"read_file", args{"sandbox_id": id, "path": ""}, "path"},
		{"read_file", args{"sandbox_id": id, "path": "/f", "offset": 4}, "3 bytes"},
		{"read_file", args{"sandbox_id": id, "path": "/f", "offset": -1}, "offset"},
		{"read_file", args{"sandbox_id": id, "path": "/f", "max_bytes": 1 << 30}, "next_offset"},
		{"read_file", args{"sandbox_id": id, "path": "/big/100000x", "max_bytes": 1 << 20}, "read /big"},
		{"write_file", args{"sandbox_id": id, "path": "/f", "content": "x", "mode": "rwx"}, "octal"},
		{"write_file", args{"sandbox_id": id, "path": "/f", "content": "?", "encoding": "base64"}, "base64"},
		{"write_file", args{"sandbox_id": id, "path": "/f", "content": "x", "encoding": "latin1"}, "encoding"},
		{"write_file", args{"sandbox_id": id, "path": "/f", "content": strings.Repeat("x", maxWrite+1)}, "run_command"},
		{"list_files", args{"sandbox_id": id, "path": "/", "depth": 99}, "depth"},
	} {
		if _, refusal := call[any](t, cs, tc.tool, tc.in); !strings.Contains(refusal, tc.want) {
			t.Errorf("%s %.80v: refused with %q, want %q in it", tc.tool, tc.in, refusal, tc.want)
		}
	}
	if got, _, _ := api.Content(id, "/f"); got != "abc" {
		t.Errorf("a refused write changed the file to %.20q", got)
	}
	api.Fail = func(*http.Request) *client.Error {
		return &client.Error{Status: 503, Code: client.CodeHostUnavailable, Message: "no memory left"}
	}
	if _, refusal := call[any](t, cs, "create_sandbox", nil); !strings.Contains(refusal, "pausing") {
		t.Errorf("a full host: %q", refusal)
	}
	api.Close()
	if _, refusal := call[any](t, cs, "list_sandboxes", nil); !strings.Contains(refusal, "wrenn up") {
		t.Errorf("no server: %q", refusal)
	}
}

// Over HTTP each request acts with the key that it carries.
func TestHTTPLendsNoKey(t *testing.T) {
	api := clienttest.New()
	defer api.Close()
	srv := httptest.NewServer(Handler(HTTPOptions{BaseURL: api.URL, Version: "test"}))
	defer srv.Close()
	with := func(key string) *mcp.StreamableClientTransport {
		return &mcp.StreamableClientTransport{Endpoint: srv.URL, HTTPClient: &http.Client{Transport: bearer(key)}, DisableStandaloneSSE: true}
	}
	cs := session(t, with(clienttest.Key))
	sb := must[sandbox](t, cs, "create_sandbox", nil)
	if got := must[commandOutput](t, cs, "run_command", args{"sandbox_id": sb.ID, "command": "echo hi"}); got.Stdout != "hi\n" {
		t.Errorf("over HTTP: %+v", got)
	}
	if _, refusal := call[any](t, session(t, with("wrn_other")), "list_sandboxes", nil); !strings.Contains(refusal, "unauthorized") {
		t.Errorf("another key: %q", refusal)
	}
	for name, h := range map[string]http.Header{
		"no key":         {},
		"another origin": {"Authorization": {"Bearer " + clienttest.Key}, "Origin": {"http://evil.example"}},
	} {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL, strings.NewReader(`{}`))
		req.Header = h
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusUnauthorized && res.StatusCode != http.StatusForbidden {
			t.Errorf("%s: status %d", name, res.StatusCode)
		}
	}
}

type bearer string

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+string(b))
	return http.DefaultTransport.RoundTrip(r)
}
