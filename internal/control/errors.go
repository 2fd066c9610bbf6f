package control

import (
	"errors"
	"fmt"
)

// Code classifies an error for callers; the wire forms map it to a status.
type Code string

// The codes.
const (
	CodeInvalid         Code = "invalid_request"
	CodeUnauthorized    Code = "unauthorized"
	CodeNotFound        Code = "not_found"
	CodeConflict        Code = "conflict"
	CodeInvalidState    Code = "invalid_state"
	CodeTooLarge        Code = "too_large"
	CodeRateLimited     Code = "rate_limited"
	CodeHostUnavailable Code = "host_unavailable"
	CodeInternal        Code = "internal_error"
)

// Error has two audiences: Code and Message are for the caller, Err (which may
// be nil) only for the log. The Message of CodeInternal is withheld too.
type Error struct {
	Code    Code
	Message string
	Err     error
	// Uncertain: a host was asked and its answer did not arrive, so whether
	// the operation happened is not known.
	Uncertain bool
}

func (e *Error) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("%s: %s: %v", e.Code, e.Message, e.Err)
	}
	return fmt.Sprintf("%s: %s", e.Code, e.Message)
}

func (e *Error) Unwrap() error { return e.Err }

// CodeOf gives the code of err: CodeInternal for what is not an *Error.
func CodeOf(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return CodeInternal
}

func errorf(c Code, format string, a ...any) *Error {
	return &Error{Code: c, Message: fmt.Sprintf(format, a...)}
}

// Invalid is an invalid_request about one field; the message names it.
func Invalid(field, format string, a ...any) *Error {
	return errorf(CodeInvalid, "%s: %s", field, fmt.Sprintf(format, a...))
}

func isUncertain(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Uncertain
}

// Sentinels of Store.
var (
	// ErrNotFound: no row has this key.
	ErrNotFound = errors.New("not found")
	// ErrExists: a row with this key is there already.
	ErrExists = errors.New("exists already")
	// ErrStale: the row has changed since it was read.
	ErrStale = errors.New("changed since it was read")
)

// reasonOf gives the words of err for a caller; a fault's own text is for the
// log.
func reasonOf(err error) string {
	if e, ok := errors.AsType[*Error](err); ok && e.Code != CodeInternal {
		return e.Message
	}
	return "an internal error; the log has the details"
}
