package e2e

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/test/harness"
)

// wsMessage is any message of the stream as it is on the wire; pointers tell
// absent from zero.
type wsMessage struct {
	Type     string  `json:"type"`
	PID      *int    `json:"pid"`
	Data     *string `json:"data"`
	ExitCode *int    `json:"exit_code"`
}

// dial opens a WebSocket without our SDK.
func dial(t *testing.T, s *harness.Server, path string) (*websocket.Conn, *http.Response, error) {
	t.Helper()
	c, resp, err := websocket.Dial(timeout(t, time.Minute), s.URL+path, &websocket.DialOptions{
		HTTPHeader: http.Header{"X-Api-Key": {apiKey(t, s)}},
	})
	if c != nil {
		c.SetReadLimit(16 << 20)
		t.Cleanup(func() { c.CloseNow() })
	}
	return c, resp, err
}

func mustDial(t *testing.T, s *harness.Server, path string) *websocket.Conn {
	t.Helper()
	c, _, err := dial(t, s, path)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	return c
}

func wsSend(t *testing.T, c *websocket.Conn, message string) {
	t.Helper()
	if err := c.Write(timeout(t, time.Minute), websocket.MessageText, []byte(message)); err != nil {
		t.Fatalf("send %s: %v", message, err)
	}
}

func wsRecv(t *testing.T, c *websocket.Conn) (m wsMessage) {
	t.Helper()
	_, b, err := c.Read(timeout(t, time.Minute))
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatalf("message %q: %v", b, err)
	}
	return m
}

// wsOutput reads until the output of that type contains want.
func wsOutput(t *testing.T, c *websocket.Conn, kind, want string) string {
	t.Helper()
	var all string
	for !strings.Contains(all, want) {
		m := wsRecv(t, c)
		if m.Type != kind || m.Data == nil {
			t.Fatalf("got %+v while waiting for %q on %s after %q", m, want, kind, all)
		}
		all += *m.Data
	}
	return all
}

// wsExit passes over output and returns the exit code.
func wsExit(t *testing.T, c *websocket.Conn) int {
	t.Helper()
	for {
		m := wsRecv(t, c)
		switch {
		case m.Type == "exit" && m.ExitCode != nil:
			return *m.ExitCode
		case m.Data == nil || m.Type == "error":
			t.Fatalf("got %+v while waiting for the exit", m)
		}
	}
}

func TestStreamSpeaksItsProtocol(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	c := mustDial(t, s, "/v1/sandboxes/"+sb.ID+"/exec/stream")
	wsSend(t, c, `{"type":"start","cmd":"sh","args":["-c","echo ready; read line; echo got $line; echo bad >&2; sleep 0.2; exit 3"]}`)
	if m := wsRecv(t, c); m.Type != "start" || m.PID == nil || *m.PID < 2 {
		t.Fatalf("first message %+v", m)
	}
	wsOutput(t, c, "stdout", "ready\n")
	wsSend(t, c, `{"type":"stdin","data":"hallo\n"}`)
	var out, errs string
	for {
		m := wsRecv(t, c)
		switch m.Type {
		case "stdout":
			out += *m.Data
			continue
		case "stderr":
			errs += *m.Data
			continue
		case "exit":
			if m.ExitCode == nil || *m.ExitCode != 3 {
				t.Errorf("exit message %+v", m)
			}
		default:
			t.Errorf("message %+v", m)
		}
		break
	}
	if out != "got hallo\n" || errs != "bad\n" {
		t.Errorf("stdout %q, stderr %q", out, errs)
	}
	if _, _, err := c.Read(timeout(t, time.Minute)); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
		t.Errorf("after the exit: %v, want a normal closure", err)
	}

	// Exit code 0 is there, not left out.
	c = mustDial(t, s, "/v1/sandboxes/"+sb.ID+"/exec/stream")
	wsSend(t, c, `{"type":"start","cmd":"true"}`)
	wsRecv(t, c)
	if m := wsRecv(t, c); m.Type != "exit" || m.ExitCode == nil || *m.ExitCode != 0 {
		t.Errorf("exit of true: %+v", m)
	}
}

func TestStreamIsRefusedBeforeTheUpgrade(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	pause(t, s, sb.ID)
	for _, path := range []string{"exec/stream", "pty"} {
		for id, want := range map[string]struct {
			status int
			code   string
		}{"nosuchsandbox": {404, "not_found"}, sb.ID: {409, "invalid_state"}} {
			_, resp, err := dial(t, s, "/v1/sandboxes/"+id+"/"+path)
			if err == nil || resp == nil {
				t.Errorf("%s of %s: upgraded", path, id)
				continue
			}
			b, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != want.status || !strings.Contains(string(b), want.code) {
				t.Errorf("%s of %s: %d %s, want %d %s", path, id, resp.StatusCode, b, want.status, want.code)
			}
		}
	}
}

func TestStreamAnswersAWrongFirstMessage(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	for _, first := range []string{
		`{"type":"stdin","data":"x"}`, `{"type":"start"}`, `{"type":"start","cmd":""}`, `not JSON`, `[]`,
		`{"type":"start","cmd":"true","surprise":1}`, `{"type":"start","cmd":7}`, `{"type":"start","cmd":"/no/such/program"}`,
	} {
		c := mustDial(t, s, "/v1/sandboxes/"+sb.ID+"/exec/stream")
		wsSend(t, c, first)
		if m := wsRecv(t, c); m.Type != "error" || m.Data == nil || *m.Data == "" {
			t.Errorf("%s: %+v, want an error with a text", first, m)
		}
		if _, _, err := c.Read(timeout(t, time.Minute)); websocket.CloseStatus(err) == -1 {
			t.Errorf("%s: after the error: %v, want a closure", first, err)
		}
	}
}

func TestStopEndsAStreamedCommand(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	c := mustDial(t, s, "/v1/sandboxes/"+sb.ID+"/exec/stream")
	wsSend(t, c, `{"type":"start","cmd":"sh","args":["-c","trap 'echo stopped; exit 9' TERM; echo ready; while :; do sleep 0.1; done"]}`)
	wsRecv(t, c)
	wsOutput(t, c, "stdout", "ready\n")
	wsSend(t, c, `{"type":"stop"}`)
	if code := wsExit(t, c); code != 9 {
		t.Errorf("exit code %d", code)
	}
	// One that does not listen is killed.
	c = mustDial(t, s, "/v1/sandboxes/"+sb.ID+"/exec/stream")
	wsSend(t, c, `{"type":"start","cmd":"sh","args":["-c","trap '' TERM; echo ready; while :; do sleep 0.1; done"]}`)
	wsRecv(t, c)
	wsOutput(t, c, "stdout", "ready\n")
	wsSend(t, c, `{"type":"stop"}`)
	if code := wsExit(t, c); code != 137 {
		t.Errorf("exit code %d", code)
	}
}

func TestAClientThatVanishesStopsNothingAndMovesLastActive(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	c := mustDial(t, s, "/v1/sandboxes/"+sb.ID+"/exec/stream")
	wsSend(t, c, `{"type":"start","cmd":"sh","args":["-c","echo ready; sleep 4; echo done > /tmp/done"]}`)
	wsRecv(t, c)
	wsOutput(t, c, "stdout", "ready\n")
	gone := time.Now()
	c.CloseNow()
	ctx := timeout(t, time.Minute)
	// While the command runs the time moves along, at its end it stands. A
	// second of the command at least must show in it.
	var last time.Time
	if !harness.Eventually(time.Minute, func() bool {
		now, err := s.GetSandbox(ctx, sb.ID)
		if err != nil {
			t.Fatal(err)
		}
		stands := now.LastActiveAt.Equal(last)
		last = now.LastActiveAt
		return stands
	}) {
		t.Fatal("the sandbox is active for ever")
	}
	if last.Before(gone.Add(time.Second)) {
		t.Errorf("last_active_at is %v, the client left at %v", last, gone)
	}
	if out := sh(t, s, sb.ID, "cat /tmp/done"); out != "done" {
		t.Errorf("the command did not go on: %q", out)
	}
}

func TestTerminalHasAPromptAndASize(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	c := mustDial(t, s, "/v1/sandboxes/"+sb.ID+"/pty")
	wsSend(t, c, `{"type":"start","cols":91,"rows":33}`)
	if m := wsRecv(t, c); m.Type != "start" || m.PID == nil {
		t.Fatalf("first message %+v", m)
	}
	prompt := wsOutput(t, c, "output", "$ ")
	if !strings.Contains(prompt, "user@") {
		t.Errorf("the prompt is %q", prompt)
	}
	wsSend(t, c, `{"type":"input","data":"stty size; tty\n"}`)
	if out := wsOutput(t, c, "output", "/dev/pts/"); !strings.Contains(out, "33 91") {
		t.Errorf("the terminal says %q, want 33 91", out)
	}
	wsSend(t, c, `{"type":"resize","cols":120,"rows":40}`)
	wsSend(t, c, `{"type":"input","data":"stty size\n"}`)
	wsOutput(t, c, "output", "40 120")
	wsSend(t, c, `{"type":"input","data":"exit 5\n"}`)
	if code := wsExit(t, c); code != 5 {
		t.Errorf("exit code %d", code)
	}
}

func TestStreamCarriesMuchOutputWhole(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	st, err := s.ExecStream(timeout(t, 2*time.Minute), sb.ID, client.ExecRequest{Cmd: "head", Args: []string{"-c", "16777216", "/dev/zero"}})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	var n countWriter
	if code, err := st.Copy(&n, nil); err != nil || code != 0 || n != 16<<20 {
		t.Errorf("%d bytes, exit code %d, %v", n, code, err)
	}
}

// countWriter counts bytes.
type countWriter int64

func (w *countWriter) Write(p []byte) (int, error) { *w += countWriter(len(p)); return len(p), nil }

func TestInputOfAStreamCanBeClosed(t *testing.T) {
	s := server(t)
	sb := spawn(t, s)
	st, err := s.ExecStream(timeout(t, time.Minute), sb.ID, client.ExecRequest{Cmd: "wc", Args: []string{"-c"}})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if _, err := st.Write(make([]byte, 200_000)); err != nil {
		t.Fatal(err)
	}
	if err := st.CloseStdin(); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if code, err := st.Copy(&out, nil); err != nil || code != 0 || strings.TrimSpace(out.String()) != "200000" {
		t.Errorf("wc says %q, exit code %d, %v", out.String(), code, err)
	}
	if _, err := st.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the exit: %v", err)
	}
}
