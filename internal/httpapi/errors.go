package httpapi

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

var statusOf = map[control.Code]int{
	control.CodeInvalid:         http.StatusBadRequest,
	control.CodeUnauthorized:    http.StatusUnauthorized,
	control.CodeNotFound:        http.StatusNotFound,
	control.CodeConflict:        http.StatusConflict,
	control.CodeInvalidState:    http.StatusConflict,
	control.CodeTooLarge:        http.StatusRequestEntityTooLarge,
	control.CodeRateLimited:     http.StatusTooManyRequests,
	control.CodeHostUnavailable: http.StatusServiceUnavailable,
	control.CodeInternal:        http.StatusInternalServerError,
}

// withheld stands for the text of an internal error.
const withheld = "an internal error; the server's log has the details under the request's X-Request-Id"

type errorBody struct {
	Error struct {
		Code    control.Code `json:"code"`
		Message string       `json:"message"`
	} `json:"error"`
}

// public gives what a caller may see of err.
func public(err error) (control.Code, string) {
	if e, ok := errors.AsType[*control.Error](err); ok && e.Code != control.CodeInternal {
		return e.Code, e.Message
	}
	return control.CodeInternal, withheld
}

// handler is a handler that returns its error instead of writing it. It must
// not return one after it has begun its answer.
type handler func(http.ResponseWriter, *http.Request) error

func (a *api) do(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			a.fail(w, r, err)
		}
	}
}

// fail writes err: code and message for the caller, all of it for the log.
func (a *api) fail(w http.ResponseWriter, r *http.Request, err error) {
	code, message := public(err)
	level := slog.LevelDebug
	if code == control.CodeInternal {
		level = slog.LevelError
	} else if code == control.CodeHostUnavailable {
		level = slog.LevelWarn
		w.Header().Set("Retry-After", "1")
	} else if e, ok := errors.AsType[*limitError](err); ok {
		w.Header().Set("Retry-After", e.RetryAfter())
	}
	a.log.Log(r.Context(), level, "request failed", "request_id", requestIDOf(r), "method", r.Method,
		"path", r.URL.Path, "code", code, "err", err)
	var body errorBody
	body.Error.Code, body.Error.Message = code, message
	_ = reply(w, statusOf[code], body)
}

func (a *api) methodNotAllowed(w http.ResponseWriter, r *http.Request) {
	var body errorBody
	body.Error.Code = control.CodeInvalid
	body.Error.Message = "method: " + r.Method + " is not for this path; GET /openapi.yaml lists what is"
	_ = reply(w, http.StatusMethodNotAllowed, body)
}

// reply writes v as JSON. It returns no error of a client that has gone.
func reply(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v)
	return nil
}
