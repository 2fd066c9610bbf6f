package client

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"time"
	"unicode/utf8"
)

// ExecRequest is a command to run in a sandbox. Cmd is run directly with Args;
// no shell looks at either.
type ExecRequest struct {
	Cmd  string
	Args []string
	// Envs are added to the sandbox's environment.
	Envs map[string]string
	// Cwd is where it runs; empty means the user's home.
	Cwd string
	// User runs it; empty means the template's default user.
	User string
	// TimeoutSec ends the command after so many seconds; 0 leaves the server's own limit.
	TimeoutSec int
	// Stdin is its whole input for Exec (less than 1 MiB, with all the rest of
	// the request), and the beginning of it for streams.
	Stdin []byte
}

// ExecResult is how a command ended and what it wrote.
type ExecResult struct {
	Stdout   []byte
	Stderr   []byte
	ExitCode int
	Duration time.Duration
	// TimedOut says that the time limit ended the command.
	TimedOut bool
}

// wireExec is the JSON of ExecRequest, in a POST and in a start message.
type wireExec struct {
	Type       string            `json:"type,omitempty"`
	Cmd        string            `json:"cmd,omitempty"`
	Args       []string          `json:"args,omitempty"`
	Envs       map[string]string `json:"envs,omitempty"`
	Cwd        string            `json:"cwd,omitempty"`
	User       string            `json:"user,omitempty"`
	TimeoutSec int               `json:"timeout_sec,omitempty"`
	Stdin      string            `json:"stdin,omitempty"`
	Encoding   string            `json:"encoding,omitempty"`
	Cols       int               `json:"cols,omitempty"`
	Rows       int               `json:"rows,omitempty"`
}

func (r ExecRequest) wire() wireExec {
	return wireExec{Cmd: r.Cmd, Args: r.Args, Envs: r.Envs, Cwd: r.Cwd, User: r.User, TimeoutSec: r.TimeoutSec}
}

// Exec runs a command to its end and returns all its output. A command that
// fails is not an error: look at ExitCode. Use ExecStream for output that is
// large or wanted while it comes.
func (c *Client) Exec(ctx context.Context, id string, req ExecRequest) (*ExecResult, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	if req.Cmd == "" {
		return nil, invalid("cmd: must not be empty")
	}
	if req.TimeoutSec < 0 {
		return nil, invalid("timeout_sec %d: must not be negative", req.TimeoutSec)
	}
	in := req.wire()
	in.Stdin, in.Encoding = encodeData(req.Stdin)
	var out wireResult
	if err := c.call(ctx, http.MethodPost, c.sandboxURL(nil, id, "exec"), in, &out); err != nil {
		return nil, err
	}
	return out.result()
}

type wireResult struct {
	Stdout     string `json:"stdout"`
	Stderr     string `json:"stderr"`
	ExitCode   *int   `json:"exit_code"`
	DurationMS int64  `json:"duration_ms"`
	Encoding   string `json:"encoding"`
	TimedOut   bool   `json:"timed_out,omitempty"`
}

func (w wireResult) result() (*ExecResult, error) {
	if w.ExitCode == nil {
		// Taking an absent code for 0 would call a failure a success.
		return nil, &Error{Code: CodeInternal, Message: "the server's answer has no exit_code"}
	}
	r := &ExecResult{ExitCode: *w.ExitCode, Duration: time.Duration(w.DurationMS) * time.Millisecond, TimedOut: w.TimedOut}
	var err error
	if r.Stdout, err = decodeData(w.Stdout, w.Encoding); err != nil {
		return nil, fmt.Errorf("stdout: %w", err)
	}
	if r.Stderr, err = decodeData(w.Stderr, w.Encoding); err != nil {
		return nil, fmt.Errorf("stderr: %w", err)
	}
	return r, nil
}

// MarshalJSON writes the result in the API's own form.
func (r ExecResult) MarshalJSON() ([]byte, error) {
	w := wireResult{ExitCode: &r.ExitCode, DurationMS: r.Duration.Milliseconds(), Encoding: encodingUTF8, TimedOut: r.TimedOut}
	if utf8.Valid(r.Stdout) && utf8.Valid(r.Stderr) {
		w.Stdout, w.Stderr = string(r.Stdout), string(r.Stderr)
	} else {
		w.Encoding = encodingBase64
		w.Stdout = base64.StdEncoding.EncodeToString(r.Stdout)
		w.Stderr = base64.StdEncoding.EncodeToString(r.Stderr)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // output full of \u003c is hard to read
	err := e.Encode(w)
	return b.Bytes(), err
}

const (
	encodingUTF8   = "utf-8"
	encodingBase64 = "base64"
)

// encodeData gives bytes the form they take in JSON: text as it is (encoding
// left out), anything else in base64.
func encodeData(p []byte) (data, encoding string) {
	if utf8.Valid(p) {
		return string(p), ""
	}
	return base64.StdEncoding.EncodeToString(p), encodingBase64
}

func decodeData(data, encoding string) ([]byte, error) {
	switch encoding {
	case "", encodingUTF8:
		return []byte(data), nil
	case encodingBase64:
		p, err := base64.StdEncoding.DecodeString(data)
		if err != nil {
			return nil, fmt.Errorf("decoding base64 from the server: %w", err)
		}
		return p, nil
	}
	return nil, fmt.Errorf("the server used the unknown encoding %q", encoding)
}
