package clienttest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/coder/websocket"

	"git.omukk.dev/wrenn/sandbox/client"
)

// message is any message of a stream, in either direction.
type message struct {
	Type       string            `json:"type"`
	Cmd        string            `json:"cmd,omitempty"`
	Args       []string          `json:"args,omitempty"`
	Envs       map[string]string `json:"envs,omitempty"`
	Cwd        string            `json:"cwd,omitempty"`
	User       string            `json:"user,omitempty"`
	TimeoutSec int               `json:"timeout_sec,omitempty"`
	Stdin      string            `json:"stdin,omitempty"`
	Data       string            `json:"data,omitempty"`
	Encoding   string            `json:"encoding,omitempty"`
	Cols       int               `json:"cols,omitempty"`
	Rows       int               `json:"rows,omitempty"`
	PID        int               `json:"pid,omitempty"`
	ExitCode   *int              `json:"exit_code,omitempty"`
}

func (m *message) set(p []byte) {
	if utf8.Valid(p) {
		m.Data = string(p)
		return
	}
	m.Data, m.Encoding = base64.StdEncoding.EncodeToString(p), "base64"
}

func (m message) bytes() ([]byte, error) {
	if m.Encoding == "base64" {
		return base64.StdEncoding.DecodeString(m.Data)
	}
	return []byte(m.Data), nil
}

// exec imitates a command: bash (runs the words of its last argument, without
// quotes), python3 (prints its last argument), limit (ends as at a time limit,
// -1), yes N (N lines), echo, err (echo to stderr), cat, exit N, binary
// (bytes that are no text), env KEY, pwd, whoami, wait (until stopped, then
// 143), and drop (breaks the connection). It returns the exit code.
func exec(ctx context.Context, m message, stdin io.Reader, stdout, stderr io.Writer) int {
	switch m.Cmd {
	case "bash", "/bin/bash":
		words := strings.Fields(strings.Join(m.Args[max(len(m.Args)-1, 0):], ""))
		if len(words) == 0 {
			return 0
		}
		m.Cmd, m.Args = words[0], words[1:]
		return exec(ctx, m, stdin, stdout, stderr)
	case "python3":
		fmt.Fprintln(stdout, strings.Join(m.Args[max(len(m.Args)-1, 0):], ""))
	case "limit":
		return -1
	case "yes":
		n, _ := strconv.Atoi(strings.Join(m.Args, ""))
		for i := range n {
			fmt.Fprintf(stdout, "line %d\n", i)
		}
	case "echo":
		fmt.Fprintln(stdout, strings.Join(m.Args, " "))
	case "err":
		fmt.Fprintln(stderr, strings.Join(m.Args, " "))
	case "cat":
		if _, err := io.Copy(stdout, stdin); err != nil {
			return 1
		}
	case "exit":
		n, _ := strconv.Atoi(strings.Join(m.Args, ""))
		return n
	case "binary":
		_, _ = stdout.Write([]byte{0xff, 0x00, 0xfe, 'x'})
	case "env":
		fmt.Fprintln(stdout, m.Envs[strings.Join(m.Args, "")])
	case "pwd":
		fmt.Fprintln(stdout, m.Cwd)
	case "whoami":
		fmt.Fprintln(stdout, m.User)
	case "wait":
		fmt.Fprintln(stdout, "waiting")
		<-ctx.Done()
		return 143
	default:
		fmt.Fprintf(stderr, "%s: command not found\n", m.Cmd)
		return 127
	}
	return 0
}

func (s *Server) execCall(w http.ResponseWriter, r *http.Request) error {
	if _, err := s.running(r); err != nil {
		return err
	}
	var in message
	if err := decode(r, &in); err != nil {
		return err
	}
	if in.Cmd == "" {
		return invalid("cmd: is missing")
	}
	var stdout, stderr strings.Builder
	in.Data = in.Stdin
	stdin, err := in.bytes()
	if err != nil {
		return invalid("stdin: " + err.Error())
	}
	code := exec(r.Context(), in, strings.NewReader(string(stdin)), &stdout, &stderr)
	res := client.ExecResult{Stdout: []byte(stdout.String()), Stderr: []byte(stderr.String()), ExitCode: code, Duration: 7e6}
	return reply(w, 200, res)
}

// conn is one stream: messages out, and input.
type conn struct {
	s   *Server
	ctx context.Context
	ws  *websocket.Conn
	mu  sync.Mutex
}

func (c *conn) send(m message) {
	b, _ := json.Marshal(m)
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.ws.Write(c.ctx, websocket.MessageText, b)
}

func (c *conn) recv() (m message, err error) {
	_, b, err := c.ws.Read(c.ctx)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("message: %w", err)
	}
	detail := m.Data
	switch m.Type {
	case "start":
		detail = strings.Join(append([]string{m.Cmd}, m.Args...), " ")
		if m.Cols > 0 {
			detail += fmt.Sprintf(" %dx%d TERM=%s", m.Cols, m.Rows, m.Envs["TERM"])
		}
	case "resize":
		detail = fmt.Sprintf("%dx%d", m.Cols, m.Rows)
	}
	c.s.record(strings.TrimSpace(m.Type + " " + detail))
	return m, nil
}

// output is one of the command's output streams.
type output struct {
	c    *conn
	kind string
}

func (o output) Write(p []byte) (int, error) {
	m := message{Type: o.kind}
	m.set(p)
	o.c.send(m)
	return len(p), o.c.ctx.Err()
}

// open upgrades the request and reads the start message; nil means that there
// is nothing more to do.
func (s *Server) open(w http.ResponseWriter, r *http.Request) (*conn, message, error) {
	if _, err := s.running(r); err != nil {
		return nil, message{}, err
	}
	ws, err := websocket.Accept(w, r, nil)
	if err != nil {
		return nil, message{}, nil // Accept has answered
	}
	ws.SetReadLimit(1 << 20)
	c := &conn{s: s, ctx: r.Context(), ws: ws}
	start, err := c.recv()
	if err != nil || start.Type != "start" {
		c.send(message{Type: "error", Data: "the first message must be start"})
		_ = ws.Close(websocket.StatusPolicyViolation, "")
		return nil, message{}, nil
	}
	return c, start, nil
}

func (s *Server) execStream(w http.ResponseWriter, r *http.Request) error {
	c, start, err := s.open(w, r)
	if c == nil {
		return err
	}
	defer c.ws.CloseNow()
	if start.Cmd == "refuse" {
		c.send(message{Type: "error", Data: "no such user"})
		_ = c.ws.Close(websocket.StatusPolicyViolation, client.CodeInvalidRequest)
		return nil
	}
	c.send(message{Type: "start", PID: 42})
	ctx, stop := context.WithCancel(c.ctx)
	defer stop()
	stdin, feed := io.Pipe()
	defer stdin.Close()
	go func() {
		defer stop() // unlike a real one, a command here ends when its caller goes
		defer feed.Close()
		for {
			m, err := c.recv()
			switch {
			case err != nil:
				return
			case m.Type == "stdin":
				if p, err := m.bytes(); err == nil {
					_, _ = feed.Write(p)
				}
			case m.Type == "close_stdin":
				feed.Close()
			case m.Type == "stop" && start.Cmd != "drop":
				stop()
			}
		}
	}()
	if start.Cmd == "drop" {
		c.send(message{Type: "stdout", Data: "half"})
		if len(start.Args) > 0 { // deaf: keeps the connection, ends by nothing
			<-ctx.Done()
		}
		return nil
	}
	code := exec(ctx, start, stdin, output{c, "stdout"}, output{c, "stderr"})
	c.send(message{Type: "exit", ExitCode: &code})
	_ = c.ws.Close(websocket.StatusNormalClosure, "")
	return nil
}

// pty imitates a shell on a terminal: it repeats what is typed, tells every
// size, and ends with 7 at Ctrl-D. A start of "drop" breaks off at Ctrl-D.
func (s *Server) pty(w http.ResponseWriter, r *http.Request) error {
	c, start, err := s.open(w, r)
	if c == nil {
		return err
	}
	defer c.ws.CloseNow()
	c.send(message{Type: "start", PID: 43})
	out := output{c, "output"}
	fmt.Fprintf(out, "size %dx%d\r\n", start.Cols, start.Rows)
	for {
		m, err := c.recv()
		if err != nil {
			return nil
		}
		switch m.Type {
		case "resize":
			fmt.Fprintf(out, "size %dx%d\r\n", m.Cols, m.Rows)
		case "stdin":
			p, _ := m.bytes()
			if !strings.Contains(string(p), "\x04") {
				_, _ = out.Write(p)
				continue
			}
			if start.Cmd == "drop" {
				return nil
			}
			code := 7
			c.send(message{Type: "exit", ExitCode: &code})
			_ = c.ws.Close(websocket.StatusNormalClosure, "")
			return nil
		}
	}
}
