package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
)

// Codes of the API.
const (
	CodeInvalidRequest  = "invalid_request"
	CodeUnauthorized    = "unauthorized"
	CodeNotFound        = "not_found"
	CodeConflict        = "conflict"
	CodeInvalidState    = "invalid_state"
	CodeTooLarge        = "too_large"
	CodeRateLimited     = "rate_limited"
	CodeHostUnavailable = "host_unavailable"
	CodeInternal        = "internal_error"
	// CodeStream is not the server's: it marks an error message inside a stream.
	CodeStream = "stream_error"
)

// Error is a refusal or failure that the server reported, or that the client
// knew before asking.
type Error struct {
	// Status is the HTTP status; 0 when nothing was sent, or when the error
	// came inside a stream.
	Status int
	// Code is one of the Code constants.
	Code string
	// Message is a sentence for people.
	Message string
}

func (e *Error) Error() string {
	if e.Message == "" {
		return e.Code
	}
	return e.Code + ": " + e.Message
}

// Is makes errors.Is match errors of the same code: a target without a status
// and message stands for its whole code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Status == 0 && t.Message == "" && t.Code == e.Code
}

// Targets for errors.Is, one for each code.
var (
	ErrInvalidRequest  error = &Error{Code: CodeInvalidRequest}
	ErrUnauthorized    error = &Error{Code: CodeUnauthorized}
	ErrNotFound        error = &Error{Code: CodeNotFound}
	ErrConflict        error = &Error{Code: CodeConflict}
	ErrInvalidState    error = &Error{Code: CodeInvalidState}
	ErrTooLarge        error = &Error{Code: CodeTooLarge}
	ErrRateLimited     error = &Error{Code: CodeRateLimited}
	ErrHostUnavailable error = &Error{Code: CodeHostUnavailable}
	ErrInternal        error = &Error{Code: CodeInternal}
)

// IsInvalidRequest tells whether the server or the client found the request malformed.
func IsInvalidRequest(err error) bool { return errors.Is(err, ErrInvalidRequest) }

// IsRateLimited tells whether the API key asks too fast or has too much under way.
func IsRateLimited(err error) bool { return errors.Is(err, ErrRateLimited) }

// IsUnauthorized tells whether the API key is missing or unknown.
func IsUnauthorized(err error) bool { return errors.Is(err, ErrUnauthorized) }

// IsNotFound tells whether the sandbox, snapshot or file does not exist.
func IsNotFound(err error) bool { return errors.Is(err, ErrNotFound) }

// IsConflict tells whether a name is taken or a concurrent change won.
func IsConflict(err error) bool { return errors.Is(err, ErrConflict) }

// IsInvalidState tells whether the sandbox's state does not allow the call.
func IsInvalidState(err error) bool { return errors.Is(err, ErrInvalidState) }

// IsTooLarge tells whether a body was larger than the call allows.
func IsTooLarge(err error) bool { return errors.Is(err, ErrTooLarge) }

// IsHostUnavailable tells whether the server answered but its host cannot take the work now.
func IsHostUnavailable(err error) bool { return errors.Is(err, ErrHostUnavailable) }

// IsUnreachable tells whether no server could be reached at all: the name did
// not resolve, or no connection came about. Nothing was sent then. (Of a call
// whose connection broke later it is not known whether the server did it.)
func IsUnreachable(err error) bool {
	var op *net.OpError
	var dns *net.DNSError
	return errors.As(err, &op) && op.Op == "dial" || errors.As(err, &dns)
}

// responseError reads the error body of a response; what is not Wrenn's (a
// proxy's page) becomes an Error with the code that fits the status.
func responseError(res *http.Response) *Error {
	body, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody))
	var env struct {
		Error struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	if json.Unmarshal(body, &env) == nil && env.Error.Code != "" {
		return &Error{Status: res.StatusCode, Code: env.Error.Code, Message: env.Error.Message}
	}
	text := strings.TrimSpace(strings.ToValidUTF8(string(body), "?"))
	if len(text) > 200 {
		text = strings.ToValidUTF8(text[:200], "") + "…"
	}
	msg := fmt.Sprintf("the server answered HTTP %d", res.StatusCode)
	if text != "" {
		msg += ": " + text
	}
	return &Error{Status: res.StatusCode, Code: codeOf(res.StatusCode), Message: msg}
}

func codeOf(status int) string {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden:
		return CodeUnauthorized
	case http.StatusNotFound:
		return CodeNotFound
	case http.StatusConflict:
		return CodeConflict
	case http.StatusRequestEntityTooLarge:
		return CodeTooLarge
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return CodeHostUnavailable
	}
	if status >= 400 && status < 500 {
		return CodeInvalidRequest
	}
	return CodeInternal
}

func invalid(format string, args ...any) *Error {
	return &Error{Code: CodeInvalidRequest, Message: fmt.Sprintf(format, args...)}
}
