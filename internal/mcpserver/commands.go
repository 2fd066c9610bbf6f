package mcpserver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"git.omukk.dev/wrenn/sandbox/client"
)

const (
	defaultCommandSec, maxCommandSec = 60, 3600
	// defaultOutput and maxOutput bound what is kept of each output stream, in
	// bytes.
	defaultOutput, maxOutput = 16 << 10, 256 << 10
	// maxCode bounds a program: Linux takes 128 KiB in one argument.
	maxCode = 120 << 10
	// stopWait is how long a command is waited for after it was told to stop,
	// and endGrace how much longer than its limit an answer may take.
	stopWait, endGrace = 10 * time.Second, 30 * time.Second
)

type where struct {
	Cwd        string            `json:"cwd,omitempty" jsonschema:"directory to run in; default the user's home"`
	User       string            `json:"user,omitempty" jsonschema:"user to run as, such as root; default user (with passwordless sudo)"`
	Envs       map[string]string `json:"envs,omitempty" jsonschema:"more environment variables"`
	TimeoutSec int               `json:"timeout_sec,omitempty" jsonschema:"seconds until it is killed; default 60, greatest 3600"`
	MaxOutput  int               `json:"max_output,omitempty" jsonschema:"bytes kept of stdout and of stderr each: the beginning and the end; default 16384, greatest 262144"`
}

type commandInput struct {
	ID      string `json:"sandbox_id" jsonschema:"as create_sandbox or list_sandboxes gave it"`
	Command string `json:"command" jsonschema:"a line for bash: pipes, && and redirection work"`
	Stdin   string `json:"stdin,omitempty" jsonschema:"its input; default none"`
	where
}

type pythonInput struct {
	ID   string `json:"sandbox_id" jsonschema:"as create_sandbox or list_sandboxes gave it"`
	Code string `json:"code" jsonschema:"a whole Python 3 program; print what you want to see"`
	where
}

// commandOutput is how a command ended.
type commandOutput struct {
	ExitCode  int     `json:"exit_code" jsonschema:"0 is success; 128+n: ended by signal n; -1: ended at its time limit"`
	Stdout    string  `json:"stdout"`
	Stderr    string  `json:"stderr"`
	TimedOut  bool    `json:"timed_out,omitempty" jsonschema:"it was killed at its time limit"`
	Truncated bool    `json:"truncated,omitempty" jsonschema:"the middle of an output was left out"`
	Seconds   float64 `json:"seconds"`
}

func (t *tools) addCommands(s *mcp.Server) {
	add(s, "run_command", runs,
		"Run a shell command in a running sandbox and wait for its end. A command that fails is no error: look at exit_code. "+
			"Long output is cut in the middle; write it to a file and use read_file for all of it. "+
			"For a server or another long-running process: `nohup CMD >/tmp/log 2>&1 &`.",
		func(ctx context.Context, in commandInput) (commandOutput, error) {
			if strings.TrimSpace(in.Command) == "" {
				return commandOutput{}, refuse("command: must not be empty")
			}
			return t.run(ctx, in.ID, in.where, client.ExecRequest{
				Cmd: "/bin/bash", Args: []string{"-l", "-c", in.Command}, Stdin: []byte(in.Stdin),
			})
		})
	add(s, "run_python", runs,
		"Run a Python 3 program in a running sandbox and wait for its end. Each call is a new interpreter; files stay. "+
			"Install packages with run_command: pip install NAME.",
		func(ctx context.Context, in pythonInput) (commandOutput, error) {
			if strings.TrimSpace(in.Code) == "" {
				return commandOutput{}, refuse("code: must not be empty")
			}
			if len(in.Code) > maxCode {
				return commandOutput{}, refuse("code: has %d bytes, at most %d; put it into a file with write_file and run it with run_command", len(in.Code), maxCode)
			}
			return t.run(ctx, in.ID, in.where, client.ExecRequest{Cmd: "python3", Args: []string{"-u", "-c", in.Code}})
		})
}

func (w *where) check() error {
	if w.TimeoutSec == 0 {
		w.TimeoutSec = defaultCommandSec
	}
	if w.TimeoutSec < 1 || w.TimeoutSec > maxCommandSec {
		return refuse("timeout_sec %d: must be from 1 to %d; start what takes longer in the background", w.TimeoutSec, maxCommandSec)
	}
	if w.MaxOutput == 0 {
		w.MaxOutput = defaultOutput
	}
	if w.MaxOutput < 256 || w.MaxOutput > maxOutput {
		return refuse("max_output %d: must be from 256 to %d; write more to a file and use read_file", w.MaxOutput, maxOutput)
	}
	return nil
}

// run starts a command and waits for it. The stream is used, not Exec, because
// output is then bounded while it comes, and a cancelled call can stop it.
func (t *tools) run(ctx context.Context, id string, w where, req client.ExecRequest) (commandOutput, error) {
	if err := w.check(); err != nil {
		return commandOutput{}, err
	}
	req.Cwd, req.User, req.Envs, req.TimeoutSec = w.Cwd, w.User, w.Envs, w.TimeoutSec
	// The stream outlives ctx for as long as stopping takes.
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(w.TimeoutSec)*time.Second+endGrace)
	defer cancel()
	began := time.Now()
	s, err := t.c.ExecStream(sctx, id, req)
	if err != nil {
		return commandOutput{}, err
	}
	defer s.Close()
	defer context.AfterFunc(ctx, func() {
		if s.Stop() != nil {
			cancel()
			return
		}
		time.AfterFunc(stopWait, cancel)
	})()
	_ = s.CloseStdin() // a command that has ended already is no failure; Recv tells
	stdout, stderr := &excerpt{limit: w.MaxOutput}, &excerpt{limit: w.MaxOutput}
	for {
		ev, err := s.Recv()
		switch {
		case err != nil && ctx.Err() != nil:
			return commandOutput{}, refuse("the call was cancelled; the command was told to stop")
		case errors.Is(err, context.DeadlineExceeded):
			return commandOutput{}, refuse("the command did not end in %d seconds and the sandbox does not answer; see get_sandbox", w.TimeoutSec)
		case err != nil:
			return commandOutput{}, err
		}
		switch ev.Type {
		case client.EventStdout:
			stdout.write(ev.Data)
		case client.EventStderr:
			stderr.write(ev.Data)
		case client.EventExit:
			out := commandOutput{ExitCode: ev.ExitCode, Stdout: stdout.String(), Stderr: stderr.String(),
				Truncated: stdout.left > 0 || stderr.left > 0, Seconds: time.Since(began).Round(time.Millisecond).Seconds()}
			// A process's own exit code is never negative.
			if ev.ExitCode < 0 {
				out.TimedOut = true
				out.Stderr += fmt.Sprintf("\n[%s; pass a greater timeout_sec, or start it in the background]", ev.Reason)
			}
			return out, nil
		}
	}
}
