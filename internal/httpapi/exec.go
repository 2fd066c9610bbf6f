package httpapi

import (
	"encoding/base64"
	"net/http"
	"unicode/utf8"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const (
	encodingUTF8   = "utf-8"
	encodingBase64 = "base64"
)

// command is what exec, exec/stream and pty have in common.
type execBody struct {
	Cmd        string            `json:"cmd"`
	Args       []string          `json:"args"`
	Envs       map[string]string `json:"envs"`
	Cwd        string            `json:"cwd"`
	User       string            `json:"user"`
	TimeoutSec int64             `json:"timeout_sec"`
	Stdin      string            `json:"stdin"`
	Encoding   string            `json:"encoding"`
}

type execResult struct {
	Stdout     string `json:"stdout"`
	Stderr     string `json:"stderr"`
	ExitCode   int32  `json:"exit_code"`
	DurationMS int64  `json:"duration_ms"`
	Encoding   string `json:"encoding"`
	TimedOut   bool   `json:"timed_out,omitempty"`
}

func (a *api) exec(w http.ResponseWriter, r *http.Request) error {
	var b execBody
	id, err := a.withBody(w, r, &b)
	if err != nil {
		return err
	}
	stdin, err := decodeData("stdin", b.Stdin, b.Encoding)
	if err != nil {
		return err
	}
	res, err := a.svc.Exec(r.Context(), id, control.ExecRequest{
		Cmd: b.Cmd, Args: b.Args, Envs: b.Envs, Cwd: b.Cwd, User: b.User,
		TimeoutSec: b.TimeoutSec, Stdin: stdin,
	})
	if err != nil {
		return err
	}
	out := execResult{
		ExitCode: res.ExitCode, DurationMS: res.Duration.Milliseconds(),
		Encoding: encodingUTF8, TimedOut: res.TimedOut,
	}
	if utf8.Valid(res.Stdout) && utf8.Valid(res.Stderr) {
		out.Stdout, out.Stderr = string(res.Stdout), string(res.Stderr)
	} else {
		out.Encoding = encodingBase64
		out.Stdout = base64.StdEncoding.EncodeToString(res.Stdout)
		out.Stderr = base64.StdEncoding.EncodeToString(res.Stderr)
	}
	return reply(w, http.StatusOK, out)
}
