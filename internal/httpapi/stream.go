package httpapi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
	"unicode/utf8"

	"github.com/coder/websocket"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// firstMessage bounds how long a stream waits for its start.
const firstMessage = 30 * time.Second

// streamKind says how exec/stream and pty differ.
type streamKind struct {
	op string
	// input names the message that carries input; stdin is always taken.
	input string
	// terminal: resize is understood, and a client that goes away hangs up.
	terminal bool
}

var (
	execKind = streamKind{op: "exec", input: "stdin"}
	ptyKind  = streamKind{op: "a terminal", input: "input", terminal: true}
)

type startMessage struct {
	Type       string            `json:"type"`
	Cmd        string            `json:"cmd"`
	Args       []string          `json:"args"`
	Envs       map[string]string `json:"envs"`
	Cwd        string            `json:"cwd"`
	User       string            `json:"user"`
	TimeoutSec int64             `json:"timeout_sec"`
}

type attachMessage struct {
	Type string `json:"type"`
	PID  uint32 `json:"pid"`
}

type ptyStartMessage struct {
	Type       string            `json:"type"`
	Cmd        string            `json:"cmd"`
	Args       []string          `json:"args"`
	Envs       map[string]string `json:"envs"`
	Cwd        string            `json:"cwd"`
	User       string            `json:"user"`
	TimeoutSec int64             `json:"timeout_sec"`
	Cols       *uint32           `json:"cols"`
	Rows       *uint32           `json:"rows"`
}

type inputMessage struct {
	Type     string `json:"type"`
	Data     string `json:"data"`
	Encoding string `json:"encoding"`
	EOF      bool   `json:"eof"`
	Cols     uint32 `json:"cols"`
	Rows     uint32 `json:"rows"`
}

// outMessage is any message of the server; fields of other types are absent.
type outMessage struct {
	Type     string  `json:"type"`
	PID      *uint32 `json:"pid,omitempty"`
	Data     *string `json:"data,omitempty"`
	Encoding string  `json:"encoding,omitempty"`
	ExitCode *int32  `json:"exit_code,omitempty"`
	Reason   string  `json:"reason,omitempty"`
}

func (a *api) execStream(w http.ResponseWriter, r *http.Request) error {
	return a.stream(w, r, execKind)
}

func (a *api) pty(w http.ResponseWriter, r *http.Request) error { return a.stream(w, r, ptyKind) }

func (a *api) stream(w http.ResponseWriter, r *http.Request, kind streamKind) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	if _, err := query(r); err != nil {
		return err
	}
	if err := a.svc.CheckRunning(r.Context(), id, kind.op); err != nil {
		return err
	}
	if r.Header.Get("Sec-Websocket-Key") == "" {
		return control.Invalid("Upgrade", "this path speaks WebSocket; the request must ask for the upgrade")
	}
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		// Accept has answered.
		a.log.DebugContext(r.Context(), "websocket refused", "request_id", requestIDOf(r), "err", err)
		return nil
	}
	defer conn.CloseNow()
	conn.SetReadLimit(maxJSON)
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cancel()
	s := &stream{api: a, conn: conn, ctx: ctx, cancel: cancel, kind: kind, id: id, requestID: requestIDOf(r)}
	s.run()
	return nil
}

// stream is one WebSocket connection to a command.
type stream struct {
	api       *api
	conn      *websocket.Conn
	ctx       context.Context // ends when the client has gone
	cancel    context.CancelFunc
	kind      streamKind
	id        string
	requestID string
}

func (s *stream) run() {
	req, err := s.readStart()
	if err != nil {
		s.refuse(err)
		return
	}
	sess, err := s.api.svc.ExecStream(s.ctx, s.id, req)
	if err != nil {
		s.refuse(err)
		return
	}
	inputEnded := make(chan struct{})
	go func() {
		defer close(inputEnded)
		s.input(sess)
	}()
	s.output(sess)
	// Both end the input: it reads the one and sends to the other.
	_ = s.conn.Close(websocket.StatusNormalClosure, "")
	s.cancel()
	sess.Close()
	<-inputEnded
}

// refuse tells the client what was wrong and closes. It is a no-op for a client
// that has gone.
func (s *stream) refuse(err error) {
	code, message := public(err)
	if code == control.CodeInternal {
		s.api.log.Error("stream failed", "request_id", s.requestID, "sandbox", s.id, "err", err)
	}
	_ = s.send(outMessage{Type: "error", Data: &message})
	_ = s.conn.Close(websocket.StatusPolicyViolation, string(code))
}

func (s *stream) send(m outMessage) error {
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	return s.conn.Write(s.ctx, websocket.MessageText, b)
}

func (s *stream) readStart() (control.ExecRequest, error) {
	ctx, cancel := context.WithTimeout(s.ctx, firstMessage)
	defer cancel()
	_, b, err := s.conn.Read(ctx)
	if err != nil {
		return control.ExecRequest{}, control.Invalid("type", "no start message came: %v", err)
	}
	var head struct {
		Type string `json:"type"`
	}
	badHead := json.Unmarshal(b, &head) != nil
	if !badHead && head.Type == "attach" && !s.kind.terminal {
		return parseAttach(b)
	}
	if badHead || head.Type != "start" {
		return control.ExecRequest{}, control.Invalid("type", `the first message must be {"type":"start","cmd":…}`)
	}
	var m ptyStartMessage
	if s.kind.terminal {
		err = decodeObject("start", b, &m)
	} else {
		var e startMessage
		err = decodeObject("start", b, &e)
		m = ptyStartMessage{Type: e.Type, Cmd: e.Cmd, Args: e.Args, Envs: e.Envs, Cwd: e.Cwd, User: e.User, TimeoutSec: e.TimeoutSec}
	}
	if err != nil {
		return control.ExecRequest{}, err
	}
	req := control.ExecRequest{Cmd: m.Cmd, Args: m.Args, Envs: m.Envs, Cwd: m.Cwd, User: m.User, TimeoutSec: m.TimeoutSec}
	if s.kind.terminal {
		req.Pty = &control.PtySize{Cols: 80, Rows: 24}
		if m.Cols != nil {
			req.Pty.Cols = *m.Cols
		}
		if m.Rows != nil {
			req.Pty.Rows = *m.Rows
		}
		if req.Cmd == "" && len(req.Args) == 0 {
			req.Cmd, req.Args = "/bin/bash", []string{"-l"}
		}
	}
	return req, nil
}

func parseAttach(b []byte) (control.ExecRequest, error) {
	var m attachMessage
	if err := decodeObject("attach", b, &m); err != nil {
		return control.ExecRequest{}, err
	}
	if m.PID == 0 {
		return control.ExecRequest{}, control.Invalid("pid", "is required: the number that the start message of the command's first stream told")
	}
	return control.ExecRequest{AttachPID: m.PID}, nil
}

// output passes on what the command says until it has ended. When the client
// goes away the rest is dropped: the command goes on.
func (s *stream) output(sess *control.Session) {
	for {
		ev, err := sess.Recv()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			s.refuse(err)
			return
		}
		if err := s.send(toMessage(ev)); err != nil {
			s.cancel()
			if ev.Kind != control.EventExit {
				_ = s.conn.CloseNow() // Ends the reading, too.
				sess.Drain()
			}
			return
		}
	}
}

func toMessage(ev control.ExecEvent) outMessage {
	switch ev.Kind {
	case control.EventStart:
		return outMessage{Type: "start", PID: &ev.PID}
	case control.EventStdout:
		return dataMessage("stdout", ev.Data)
	case control.EventStderr:
		return dataMessage("stderr", ev.Data)
	case control.EventPty:
		return dataMessage("output", ev.Data)
	}
	return outMessage{Type: "exit", ExitCode: &ev.ExitCode, Reason: ev.Reason}
}

func dataMessage(kind string, p []byte) outMessage {
	m := outMessage{Type: kind}
	text := string(p)
	if !utf8.Valid(p) {
		m.Encoding = encodingBase64
		text = base64.StdEncoding.EncodeToString(p)
	}
	m.Data = &text
	return m
}

// input passes on what the client says until it has gone. It is the only
// sender of the session.
func (s *stream) input(sess *control.Session) {
	defer s.cancel()
	for {
		_, b, err := s.conn.Read(s.ctx)
		if err != nil {
			break
		}
		in, err := s.parse(b)
		if err != nil {
			s.refuse(err)
			break
		}
		for _, i := range in {
			// A command that has ended takes nothing; its exit is on the way.
			_ = sess.Send(i)
		}
	}
	if s.kind.terminal {
		// As when a terminal is closed: nobody can pick it up again.
		_ = sess.Send(control.ExecInput{Stop: true})
	}
}

// parse reads one message of the client; it may mean two for the command.
func (s *stream) parse(b []byte) ([]control.ExecInput, error) {
	var m inputMessage
	if err := decodeObject("message", b, &m); err != nil {
		return nil, err
	}
	switch m.Type {
	case s.kind.input, "stdin":
		data, err := decodeData("data", m.Data, m.Encoding)
		if err != nil {
			return nil, err
		}
		var in []control.ExecInput
		if len(data) > 0 {
			in = append(in, control.ExecInput{Stdin: data})
		}
		if m.EOF {
			in = append(in, control.ExecInput{CloseStdin: true})
		}
		return in, nil
	case "close_stdin":
		return []control.ExecInput{{CloseStdin: true}}, nil
	case "stop":
		return []control.ExecInput{{Stop: true}}, nil
	case "resize":
		if s.kind.terminal {
			size := control.PtySize{Cols: m.Cols, Rows: m.Rows}
			return []control.ExecInput{{Resize: &size}}, size.Validate()
		}
	}
	return nil, control.Invalid("type", "%s is no type of message here; there are %s, close_stdin, stop%s",
		quoteShort(m.Type), s.kind.input, map[bool]string{true: ", resize"}[s.kind.terminal])
}
