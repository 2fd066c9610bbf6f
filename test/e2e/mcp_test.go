package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// An agent's whole work through `wrenn mcp`, as its configuration starts it.
func TestAnAgentWorksThroughMCP(t *testing.T) {
	s := server(t)
	cmd := exec.Command(filepath.Join(harness.Bin(), "wrenn"), "mcp")
	cmd.Env = append(os.Environ(), "WRENN_URL="+s.URL, "WRENN_API_KEY="+apiKey(t, s))
	cmd.Stderr = t.Output()
	cs, err := mcp.NewClient(&mcp.Implementation{Name: "e2e", Version: "0"}, nil).
		Connect(timeout(t, time.Minute), &mcp.CommandTransport{Command: cmd}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cs.Close(); err != nil {
			t.Errorf("wrenn mcp did not end well when its input did: %v", err)
		}
	}()
	call := func(tool string, args map[string]any) map[string]any {
		t.Helper()
		res, err := cs.CallTool(timeout(t, 3*time.Minute), &mcp.CallToolParams{Name: tool, Arguments: args})
		if err != nil {
			t.Fatalf("%s: %v", tool, err)
		}
		text := res.Content[0].(*mcp.TextContent).Text
		if res.IsError {
			t.Fatalf("%s: %s", tool, text)
		}
		var out map[string]any
		if err := json.Unmarshal([]byte(text), &out); err != nil {
			t.Fatalf("%s: %v: %s", tool, err, text)
		}
		return out
	}
	id := call("create_from_snapshot", map[string]any{"snapshot": warm})["sandbox_id"].(string)
	t.Cleanup(func() { remove(t, s, id) })
	on := func(more map[string]any) map[string]any { more["sandbox_id"] = id; return more }

	call("write_file", on(map[string]any{"path": "/tmp/n.txt", "content": "20\n22\n"}))
	py := call("run_python", on(map[string]any{"code": "print(sum(int(l) for l in open('/tmp/n.txt')))"}))
	if py["stdout"] != "42\n" || py["exit_code"] != 0.0 {
		t.Errorf("python: %v", py)
	}
	sh := call("run_command", on(map[string]any{"command": "sleep 1000 & echo $! >/tmp/pid; seq 100000 | tee /tmp/seq; exit 3", "max_output": 1000}))
	if sh["exit_code"] != 3.0 || sh["truncated"] != true || !strings.HasSuffix(sh["stdout"].(string), "100000\n") {
		t.Errorf("shell: %v", sh)
	}
	slow := call("run_command", on(map[string]any{"command": "echo begun; sleep 600", "timeout_sec": 2}))
	if slow["timed_out"] != true || slow["stdout"] != "begun\n" {
		t.Errorf("at its limit: %v", slow)
	}
	call("pause_sandbox", on(map[string]any{}))
	call("resume_sandbox", on(map[string]any{}))
	if got := call("run_command", on(map[string]any{"command": "kill -0 $(cat /tmp/pid) && wc -l </tmp/seq"})); got["stdout"] != "100000\n" {
		t.Errorf("after pause and resume: %v", got)
	}
	call("snapshot_sandbox", on(map[string]any{"name": "by-agent"}))
	t.Cleanup(func() { _ = s.DeleteSnapshot(timeout(t, time.Minute), "by-agent") })
	clone := call("create_from_snapshot", map[string]any{"snapshot": "by-agent"})["sandbox_id"].(string)
	t.Cleanup(func() { remove(t, s, clone) })
	if got := call("read_file", map[string]any{"sandbox_id": clone, "path": "/tmp/n.txt"}); got["content"] != "20\n22\n" {
		t.Errorf("the clone's file: %v", got)
	}
	if got := call("list_files", map[string]any{"sandbox_id": clone, "path": "/tmp"}); len(got["entries"].([]any)) < 3 {
		t.Errorf("the clone's files: %v", got)
	}
	call("destroy_sandbox", map[string]any{"sandbox_id": clone})
	call("delete_snapshot", map[string]any{"name": "by-agent"})
	if got := call("get_sandbox", on(map[string]any{})); got["status"] != "running" {
		t.Errorf("the source: %v", got)
	}
}
