package client_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"git.omukk.dev/wrenn/sandbox/client"
)

func TestExec(t *testing.T) {
	s, c := start(t)
	sb := s.Add(client.Sandbox{})
	for _, tc := range []struct {
		name                 string
		req                  client.ExecRequest
		stdout, stderr, code string
	}{
		{"arguments", client.ExecRequest{Cmd: "echo", Args: []string{"a b", "ü"}}, "a b ü\n", "", "0"},
		{"stderr", client.ExecRequest{Cmd: "err", Args: []string{"x"}}, "", "x\n", "0"},
		{"exit code", client.ExecRequest{Cmd: "exit", Args: []string{"3"}}, "", "", "3"},
		{"bytes that are no text", client.ExecRequest{Cmd: "binary"}, "\xff\x00\xfex", "", "0"},
		{"text input", client.ExecRequest{Cmd: "cat", Stdin: []byte("in")}, "in", "", "0"},
		{"binary input", client.ExecRequest{Cmd: "cat", Stdin: []byte("\xff\xfe")}, "\xff\xfe", "", "0"},
		{"environment", client.ExecRequest{Cmd: "env", Args: []string{"K"}, Envs: map[string]string{"K": "v"}}, "v\n", "", "0"},
		{"directory", client.ExecRequest{Cmd: "pwd", Cwd: "/tmp"}, "/tmp\n", "", "0"},
		{"user", client.ExecRequest{Cmd: "whoami", User: "root"}, "root\n", "", "0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := c.Exec(t.Context(), sb.ID, tc.req)
			if err != nil {
				t.Fatal(err)
			}
			if string(r.Stdout) != tc.stdout || string(r.Stderr) != tc.stderr || string(rune('0'+r.ExitCode)) != tc.code {
				t.Errorf("exec gave %q, %q, %d", r.Stdout, r.Stderr, r.ExitCode)
			}
			if r.Duration != 7*time.Millisecond {
				t.Errorf("duration %v, want 7ms", r.Duration)
			}
			st, err := c.ExecStream(t.Context(), sb.ID, tc.req)
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
			if err := st.CloseStdin(); err != nil {
				t.Fatal(err)
			}
			var stdout, stderr bytes.Buffer
			code, err := st.Copy(&stdout, &stderr)
			if err != nil {
				t.Fatal(err)
			}
			if stdout.String() != tc.stdout || stderr.String() != tc.stderr || string(rune('0'+code)) != tc.code {
				t.Errorf("stream gave %q, %q, %d", &stdout, &stderr, code)
			}
		})
	}
}

func TestStreamEvents(t *testing.T) {
	s, c := start(t)
	sb := s.Add(client.Sandbox{})
	st, err := c.ExecStream(t.Context(), sb.ID, client.ExecRequest{Cmd: "wait"})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if ev, err := st.Recv(); err != nil || ev.Type != client.EventStart || ev.PID != 42 {
		t.Fatalf("first event %+v, %v", ev, err)
	}
	if ev, err := st.Recv(); err != nil || ev.Type != client.EventStdout || string(ev.Data) != "waiting\n" {
		t.Fatalf("second event %+v, %v", ev, err)
	}
	if err := st.Stop(); err != nil {
		t.Fatal(err)
	}
	if ev, err := st.Recv(); err != nil || ev.Type != client.EventExit || ev.ExitCode != 143 {
		t.Fatalf("third event %+v, %v", ev, err)
	}
	for range 2 {
		if _, err := st.Recv(); err != io.EOF {
			t.Fatalf("after the exit: %v, want io.EOF", err)
		}
	}
}

func TestStreamOfMuchInput(t *testing.T) {
	s, c := start(t)
	sb := s.Add(client.Sandbox{})
	st, err := c.ExecStream(t.Context(), sb.ID, client.ExecRequest{Cmd: "cat"})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	// Characters of three bytes, so that messages are cut within them.
	in := strings.Repeat("€", 100_000)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(st, strings.NewReader(in))
		sent <- errors.Join(err, st.CloseStdin(), st.CloseStdin())
	}()
	var out strings.Builder
	code, err := st.Copy(&out, nil)
	if serr := <-sent; err != nil || serr != nil || code != 0 {
		t.Fatalf("copy: %v, sending: %v, code %d", err, serr, code)
	}
	if out.String() != in {
		t.Errorf("%d bytes came back, not the same %d", out.Len(), len(in))
	}
}

func TestStreamErrors(t *testing.T) {
	s, c := start(t)
	sb, paused := s.Add(client.Sandbox{}), s.Add(client.Sandbox{Status: client.StatusPaused})
	if _, err := c.ExecStream(t.Context(), "nobody", client.ExecRequest{Cmd: "x"}); !client.IsNotFound(err) {
		t.Errorf("unknown sandbox: %v, want not_found", err)
	}
	if _, err := c.PTY(t.Context(), paused.ID, client.ExecRequest{}, client.PTYSize{Cols: 80, Rows: 24}); !client.IsInvalidState(err) {
		t.Errorf("paused sandbox: %v, want invalid_state", err)
	}
	run := func(ctx context.Context, cmd string) error {
		st, err := c.ExecStream(ctx, sb.ID, client.ExecRequest{Cmd: cmd})
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		_, err = st.Copy(nil, nil)
		return err
	}
	var e *client.Error
	if err := run(t.Context(), "refuse"); !errors.As(err, &e) || e.Code != client.CodeInvalidRequest || e.Message != "no such user" {
		t.Errorf("error message: %v", err)
	}
	if err := run(t.Context(), "drop"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("broken stream: %v, want io.ErrUnexpectedEOF", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := run(ctx, "wait"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled: %v, want the deadline", err)
	}
}

type failWriter struct{}

func (failWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestCopyStopsWhenOutputCannotBeWritten(t *testing.T) {
	s, c := start(t)
	sb := s.Add(client.Sandbox{})
	st, err := c.ExecStream(t.Context(), sb.ID, client.ExecRequest{Cmd: "echo", Args: []string{"x"}})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if _, err := st.Copy(failWriter{}, nil); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("got %v, want the writer's error", err)
	}
}

// A server may send anything; nothing of it may pass for a command's success.
func TestOddStreamMessages(t *testing.T) {
	var messages []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer ws.CloseNow()
		_, _, _ = ws.Read(r.Context())
		for _, m := range messages {
			_ = ws.Write(r.Context(), websocket.MessageText, []byte(m))
		}
		_ = ws.Close(websocket.StatusNormalClosure, "")
	}))
	defer srv.Close()
	c, _ := client.New(client.Options{BaseURL: srv.URL})
	run := func(m ...string) (int, string, error) {
		messages = m
		st, err := c.ExecStream(t.Context(), "a", client.ExecRequest{Cmd: "x"})
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		var out strings.Builder
		code, err := st.Copy(&out, &out)
		return code, out.String(), err
	}
	for _, m := range []string{
		``, `nonsense`, `[]`, `{"type":"exit"}`, `{"type":"exit","exit_code":"0"}`,
		`{"type":"stdout","data":"*","encoding":"base64"}`, `{"type":"stdout","data":"x","encoding":"rot13"}`,
	} {
		if code, out, err := run(m); err == nil {
			t.Errorf("%q gave %d, %q", m, code, out)
		}
	}
	var e *client.Error
	if _, _, err := run(`{"type":"error","data":"odd"}`); !errors.As(err, &e) || e.Code != client.CodeStream || e.Message != "odd" {
		t.Errorf("an error without a code: %v", err)
	}
	if _, _, err := run(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("an orderly close without an exit: %v", err)
	}
	code, out, err := run(`{"type":"news","data":"x"}`, `{"type":"stdout","data":"4oKs","encoding":"base64"}`,
		`{"type":"stderr","data":"é","encoding":"utf-8"}`, `{"type":"exit","exit_code":0}`)
	if code != 0 || out != "€é" || err != nil {
		t.Errorf("good messages gave %d, %q, %v", code, out, err)
	}
}

func TestPTY(t *testing.T) {
	s, c := start(t)
	sb := s.Add(client.Sandbox{})
	st, err := c.PTY(t.Context(), sb.ID, client.ExecRequest{}, client.PTYSize{Cols: 80, Rows: 24})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := st.Resize(client.PTYSize{Cols: 100, Rows: 0}); !client.IsInvalidRequest(err) {
		t.Errorf("bad size: %v", err)
	}
	if err := st.Resize(client.PTYSize{Cols: 132, Rows: 43}); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write([]byte("typed\x1b[A\xff\x04")); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	code, err := st.Copy(&out, nil)
	if want := "size 80x24\r\nsize 132x43\r\n"; code != 7 || err != nil || out.String() != want {
		t.Errorf("got %d, %v, %q", code, err, out.String())
	}
}
