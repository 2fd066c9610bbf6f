package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/client"
)

// Exit codes, as the root command's help and docs/cli.md document them.
const (
	exitOK           = 0
	exitError        = 1
	exitUsage        = 2
	exitNotFound     = 3
	exitConflict     = 4
	exitUnauthorized = 5
	exitUnavailable  = 6
	exitOwnFailure   = 125
	exitInterrupted  = 130
)

// passThrough annotates commands whose exit code is the remote command's, so
// that wrenn's own failures must be told apart by exitOwnFailure.
const passThrough = "wrenn/pass-through"

// usageError is a command line that can not be meant.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// remoteExit carries the exit code of a command that ran in a sandbox.
type remoteExit int

func (e remoteExit) Error() string { return fmt.Sprintf("the command exited with %d", int(e)) }

// code fits the remote code into what a process can exit with.
func (e remoteExit) code() int {
	if e < 0 || e > 255 {
		return 255
	}
	return int(e)
}

// errInterrupted is the cause of a context that Ctrl-C ended.
var errInterrupted = errors.New("interrupted")

// noKeyError says that no API key was found, and where it was looked for.
type noKeyError struct{ error }

func (e noKeyError) Unwrap() error { return e.error }

// finish reports err, if there is one, and returns the exit code.
func finish(cmd *cobra.Command, err error, stderr io.Writer) int {
	if err == nil {
		return exitOK
	}
	var remote remoteExit
	if errors.As(err, &remote) {
		return remote.code() // the command said what there is to say
	}
	if errors.Is(err, errInterrupted) {
		fmt.Fprintln(stderr, "wrenn: interrupted")
		return exitInterrupted
	}
	for _, e := range parts(err) {
		fmt.Fprintf(stderr, "wrenn: %s\n", printable(message(e)))
	}
	if r := remedy(cmd, err); r != "" {
		fmt.Fprintf(stderr, "  %s\n", r)
	}
	if cmd != nil && cmd.Annotations[passThrough] != "" {
		return exitOwnFailure
	}
	return exitCode(err)
}

func exitCode(err error) int {
	var usage usageError
	var noKey noKeyError
	var apiErr *client.Error
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &noKey):
		return exitUnauthorized
	case errors.As(err, &apiErr):
		return apiExitCode(apiErr.Code)
	case client.IsUnreachable(err):
		return exitUnavailable
	}
	return exitError
}

func apiExitCode(code string) int {
	switch code {
	case client.CodeInvalidRequest:
		return exitUsage
	case client.CodeNotFound:
		return exitNotFound
	case client.CodeConflict, client.CodeInvalidState:
		return exitConflict
	case client.CodeUnauthorized:
		return exitUnauthorized
	case client.CodeHostUnavailable, client.CodeRateLimited:
		return exitUnavailable
	}
	return exitError
}

// parts are the errors that were joined into err, or err alone.
func parts(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var all []error
		for _, e := range joined.Unwrap() {
			all = append(all, parts(e)...)
		}
		return all
	}
	return []error{err}
}

// message says what happened; a connection that failed is told by the server's
// address and not by the request that happened to be the first.
func message(err error) string {
	var ue *url.Error
	if errors.As(err, &ue) && client.IsUnreachable(err) {
		return fmt.Sprintf("no server answers at %s (%v)", serverURL(), ue.Err)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "timed out: " + err.Error()
	}
	return err.Error()
}

// remedy says what to do about err, where there is something to say.
func remedy(cmd *cobra.Command, err error) string {
	var usage usageError
	var noKey noKeyError
	var broken *url.Error
	switch {
	case errors.As(err, &usage):
		if cmd != nil {
			return fmt.Sprintf("see: %s --help", cmd.CommandPath())
		}
	case errors.As(err, &noKey):
		return "run it on the server's host as the user who started wrenn up, or set WRENN_API_KEY"
	case client.IsUnauthorized(err):
		return "the key comes from " + keySource() + "; the server's first key is in $WRENN_DIR/api-key on its host"
	case client.IsHostUnavailable(err):
		return "try again in a moment; on the server's host, wrenn doctor says what is missing"
	case client.IsRateLimited(err):
		return "wait a moment; wrenn up --rate-limit and --max-requests set the limits"
	case client.IsInvalidState(err):
		return "see the state with: wrenn sandbox get ID (a paused sandbox: wrenn sandbox resume ID)"
	case client.IsNotFound(err):
		return "see what there is with: wrenn sandbox list, wrenn snapshot list, wrenn template list"
	case client.IsUnreachable(err):
		return "start it with: wrenn up (or set WRENN_URL to where it runs)"
	case errors.As(err, &broken) && !broken.Timeout():
		return "the connection broke; what the server had accepted it goes on with: see wrenn sandbox list"
	}
	return ""
}
