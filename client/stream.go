package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/coder/websocket"
)

const (
	// maxMessage bounds one message from the server.
	maxMessage = 16 << 20
	// closeWait bounds the wait for the end of a stream that reported an error.
	closeWait = time.Second
	// stdinChunk is the most input put into one message, in bytes.
	stdinChunk = 32 << 10
)

// EventType says what an Event is.
type EventType string

// Types of events. A stream sends start once, then output, then exit.
const (
	EventStart  EventType = "start"  // PID is set
	EventStdout EventType = "stdout" // Data is set
	EventStderr EventType = "stderr" // Data is set
	EventOutput EventType = "output" // Data is set; what a terminal shows
	EventExit   EventType = "exit"   // ExitCode is set
)

// Event is one message from a running command.
type Event struct {
	Type     EventType
	PID      int
	Data     []byte
	ExitCode int
	// Reason says how a command ended that did not exit ("signal: killed").
	Reason string
}

// Stream is a command or a terminal that runs in a sandbox. One goroutine may
// call Recv (or Copy) while others call the sending methods. Close must be
// called; it ends the connection but not the command, which Stop does.
type Stream struct {
	ctx  context.Context
	conn *websocket.Conn
	done bool // the exit event was given out; Recv only
	send sync.Mutex
	eof  bool // close_stdin was sent; guarded by send
}

// PTYSize is the size of a terminal in characters.
type PTYSize struct {
	Cols, Rows int
}

func (s PTYSize) check() error {
	if s.Cols < 1 || s.Cols > 65535 || s.Rows < 1 || s.Rows > 65535 {
		return invalid("terminal size %dx%d: cols and rows must be 1 to 65535", s.Cols, s.Rows)
	}
	return nil
}

// ExecStream starts a command with piped input and output. ctx bounds the
// whole stream, not only its start. req.Stdin is sent first; the input stays
// open until CloseStdin.
func (c *Client) ExecStream(ctx context.Context, id string, req ExecRequest) (*Stream, error) {
	if req.Cmd == "" {
		return nil, invalid("cmd: must not be empty")
	}
	return c.stream(ctx, id, "exec/stream", req, PTYSize{})
}

// AttachStream picks up the output of a command that runs, by the PID of its
// start event: after a connection broke, or the server was started again. What
// it said in between is not repeated. A PID that no running command has is an
// *Error from Recv.
func (c *Client) AttachStream(ctx context.Context, id string, pid int) (*Stream, error) {
	if pid < 1 {
		return nil, invalid("pid %d: must be at least 1", pid)
	}
	s, err := c.dialStream(ctx, id, "exec/stream")
	if err != nil {
		return nil, err
	}
	if err := s.message(wireMessage{Type: "attach", PID: pid}); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// PTY starts a command on a terminal of the given size; an empty Cmd means the
// user's login shell.
func (c *Client) PTY(ctx context.Context, id string, req ExecRequest, size PTYSize) (*Stream, error) {
	if err := size.check(); err != nil {
		return nil, err
	}
	return c.stream(ctx, id, "pty", req, size)
}

func (c *Client) stream(ctx context.Context, id, path string, req ExecRequest, size PTYSize) (*Stream, error) {
	if req.TimeoutSec < 0 {
		return nil, invalid("timeout_sec %d: must not be negative", req.TimeoutSec)
	}
	s, err := c.dialStream(ctx, id, path)
	if err != nil {
		return nil, err
	}
	start := req.wire()
	start.Type, start.Cols, start.Rows = "start", size.Cols, size.Rows
	if err := s.message(start); err != nil {
		_ = s.Close()
		return nil, err
	}
	if len(req.Stdin) > 0 {
		if _, err := s.Write(req.Stdin); err != nil {
			_ = s.Close()
			return nil, err
		}
	}
	return s, nil
}

// dialStream opens the connection; the first message is the caller's.
func (c *Client) dialStream(ctx context.Context, id, path string) (*Stream, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	o := &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: make(map[string][]string)}
	c.setHeaders(o.HTTPHeader)
	url := c.sandboxURL(nil, id) + "/" + path
	conn, res, err := websocket.Dial(ctx, url, o)
	if err != nil {
		if res != nil && res.StatusCode >= 300 {
			return nil, responseError(res) // the library closed and kept the body's beginning
		}
		return nil, fmt.Errorf("opening the stream %s: %w", url, err)
	}
	conn.SetReadLimit(maxMessage)
	return &Stream{ctx: ctx, conn: conn}, nil
}

func (s *Stream) message(m any) error {
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encoding a stream message: %w", err)
	}
	s.send.Lock()
	defer s.send.Unlock()
	if err := s.conn.Write(s.ctx, websocket.MessageText, b); err != nil {
		return fmt.Errorf("sending to the stream: %w", err)
	}
	return nil
}

type wireMessage struct {
	Type     string `json:"type"`
	Data     string `json:"data,omitempty"`
	Encoding string `json:"encoding,omitempty"`
	Cols     int    `json:"cols,omitempty"`
	Rows     int    `json:"rows,omitempty"`
	PID      int    `json:"pid,omitempty"`
	ExitCode *int   `json:"exit_code,omitempty"`
	Reason   string `json:"reason,omitempty"`
}

// Write sends input to the command.
func (s *Stream) Write(p []byte) (int, error) {
	for n := 0; n < len(p); {
		end := min(n+stdinChunk, len(p))
		m := wireMessage{Type: "stdin"}
		m.Data, m.Encoding = encodeData(p[n:end])
		if err := s.message(m); err != nil {
			return n, err
		}
		n = end
	}
	return len(p), nil
}

// CloseStdin marks the end of the command's input. More calls do nothing.
func (s *Stream) CloseStdin() error {
	s.send.Lock()
	sent := s.eof
	s.eof = true
	s.send.Unlock()
	if sent {
		return nil
	}
	return s.message(wireMessage{Type: "close_stdin"})
}

// Stop asks the command to end (SIGTERM, then SIGKILL); its exit event follows.
func (s *Stream) Stop() error { return s.message(wireMessage{Type: "stop"}) }

// Resize tells a terminal its new size.
func (s *Stream) Resize(size PTYSize) error {
	if err := size.check(); err != nil {
		return err
	}
	return s.message(wireMessage{Type: "resize", Cols: size.Cols, Rows: size.Rows})
}

// Recv waits for the next event. After the exit event it returns io.EOF. An
// error message of the server is an *Error with the server's code, or
// CodeStream when it gave none, and ends the stream; a connection that
// ends before the exit is an error that wraps io.ErrUnexpectedEOF. Messages of
// unknown types are passed over.
func (s *Stream) Recv() (Event, error) {
	for {
		if s.done {
			return Event{}, io.EOF
		}
		_, b, err := s.conn.Read(s.ctx)
		if err != nil {
			if cerr := s.ctx.Err(); cerr != nil {
				return Event{}, fmt.Errorf("waiting for the command: %w", cerr)
			}
			return Event{}, fmt.Errorf("the stream broke before the command's exit was known: %w",
				errors.Join(io.ErrUnexpectedEOF, err))
		}
		var m wireMessage
		if err := json.Unmarshal(b, &m); err != nil {
			return Event{}, fmt.Errorf("reading a stream message: %w", err)
		}
		if m.Type == "error" {
			return Event{}, &Error{Code: s.closeCode(), Message: m.Data}
		}
		ev, known, err := m.event()
		if err != nil || known {
			s.done = ev.Type == EventExit
			return ev, err
		}
	}
}

// closeCode reads the code that the server gives as the reason of closing
// after an error message.
func (s *Stream) closeCode() string {
	ctx, cancel := context.WithTimeout(s.ctx, closeWait)
	defer cancel()
	_, _, err := s.conn.Read(ctx)
	var ce websocket.CloseError
	if errors.As(err, &ce) && ce.Reason != "" {
		return ce.Reason
	}
	return CodeStream
}

func (m wireMessage) event() (ev Event, known bool, err error) {
	ev.Type = EventType(m.Type)
	switch ev.Type {
	case EventStart:
		ev.PID = m.PID
	case EventStdout, EventStderr, EventOutput:
		ev.Data, err = decodeData(m.Data, m.Encoding)
	case EventExit:
		if m.ExitCode == nil {
			return Event{}, false, &Error{Code: CodeStream, Message: "the exit message has no exit_code"}
		}
		ev.ExitCode, ev.Reason = *m.ExitCode, m.Reason
	default:
		return Event{}, false, nil
	}
	if err != nil {
		return Event{}, false, err
	}
	return ev, true, nil
}

// Copy writes the command's output to stdout and stderr (nil drops it; what a
// terminal shows goes to stdout) until it ends, and returns its exit code.
func (s *Stream) Copy(stdout, stderr io.Writer) (exitCode int, err error) {
	for {
		ev, err := s.Recv()
		if err != nil {
			return 0, err
		}
		w := stdout
		switch ev.Type {
		case EventExit:
			return ev.ExitCode, nil
		case EventStderr:
			w = stderr
		}
		if w == nil || len(ev.Data) == 0 {
			continue
		}
		if _, err := w.Write(ev.Data); err != nil {
			return 0, fmt.Errorf("writing the command's output: %w", err)
		}
	}
}

// Close ends the connection. The command goes on if it has not ended.
func (s *Stream) Close() error {
	if s.ctx.Err() != nil {
		return s.conn.CloseNow()
	}
	if err := s.conn.Close(websocket.StatusNormalClosure, ""); err != nil {
		// The server may have closed first: nothing of ours is lost by that.
		_ = s.conn.CloseNow()
	}
	return nil
}
