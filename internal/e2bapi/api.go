package e2bapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"

	"connectrpc.com/connect"
	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// EnvdVersion is what the guest agent speaks; the SDKs switch features by it.
const EnvdVersion = "0.6.13"

// maxBody bounds the JSON of a request.
const maxBody = 1 << 20

// Options configure the handler. Service is required.
type Options struct {
	Service *control.Service
	// History answers for metrics; nil: there are none.
	History *History
	// Domain is below what published ports have their hosts, with the port
	// where it is not the scheme's own.
	Domain string
	// PrivatePorts makes ports private where a create does not say.
	PrivatePorts bool
	// Logger: nil discards.
	Logger *slog.Logger
	// Limit counts a request of an API key in, or refuses it with an error that
	// has RetryAfter() string, in seconds; nil: there is no limit.
	Limit func(keyID string) (end func(), err error)
	// More adds routes behind the same authentication, Public such without it;
	// nil adds none. They write their errors with fail.
	More, Public func(r chi.Router, fail func(http.ResponseWriter, *http.Request, error))
}

type api struct {
	Options
	svc *control.Service
	log *slog.Logger
}

// New makes the handler. Its paths are the SDKs' own; whoever mounts it under a
// prefix strips that.
func New(o Options) http.Handler {
	a := &api{Options: o, svc: o.Service, log: o.Logger}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	r := chi.NewRouter()
	r.Use(a.recoverPanic)
	r.NotFound(a.do(func(http.ResponseWriter, *http.Request) error {
		return &control.Error{Code: control.CodeNotFound, Message: "there is no such path here"}
	}))
	r.MethodNotAllowed(func(w http.ResponseWriter, r *http.Request) {
		writeError(w, http.StatusMethodNotAllowed, r.Method+" is not for this path")
	})
	r.Get("/health", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) })
	r.Group(func(r chi.Router) {
		r.Use(a.authenticate)
		a.routes(r)
		if o.More != nil {
			o.More(r, a.fail)
		}
	})
	if o.Public != nil {
		o.Public(r, a.fail)
	}
	return r
}

func (a *api) routes(r chi.Router) {
	r.Post("/v2/sandboxes", a.do(a.create(defaultTimeoutV2)))
	r.Post("/sandboxes", a.do(a.create(defaultTimeout)))
	r.Get("/v2/sandboxes", a.do(a.list))
	r.Get("/sandboxes", a.do(a.listRunning))
	r.Get("/sandboxes/metrics", a.do(a.metricsOfMany))
	r.Post("/v2/sandboxes/{id}/connect", a.do(a.connect(defaultTimeoutV2)))
	r.Post("/sandboxes/{id}/connect", a.do(a.connect(defaultTimeout)))
	r.Post("/sandboxes/{id}/resume", a.do(a.resume))
	r.Get("/sandboxes/{id}", a.do(a.get))
	r.Delete("/sandboxes/{id}", a.do(a.kill))
	r.Post("/sandboxes/{id}/timeout", a.do(a.setTimeout))
	r.Post("/sandboxes/{id}/refreshes", a.do(a.refresh))
	r.Post("/sandboxes/{id}/pause", a.do(a.pause))
	r.Get("/sandboxes/{id}/metrics", a.do(a.metrics))
	r.Put("/sandboxes/{id}/network", a.do(a.setNetwork))

	r.Post("/sandboxes/{id}/snapshots", a.do(a.createSnapshot))
	r.Post("/sandboxes/{id}/fork", a.do(a.fork))
	r.Get("/snapshots", a.do(a.listSnapshots))
	r.Delete("/templates/{templateID}", a.do(a.deleteSnapshot))
}

// authenticate lets in who has a key. Every key has two forms: the SDKs' older
// versions take only one that begins with e2b_.
func (a *api) authenticate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := r.Header.Get("X-API-Key")
		if key == "" {
			if scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
				key = strings.TrimSpace(token)
			}
		}
		k, err := a.svc.Authenticate(r.Context(), key)
		if rest, ok := strings.CutPrefix(key, "e2b_"); ok && control.CodeOf(err) == control.CodeUnauthorized {
			k, err = a.svc.Authenticate(r.Context(), "wrn_"+rest)
		}
		if err != nil {
			a.fail(w, r, err)
			return
		}
		if a.Limit != nil {
			end, err := a.Limit(k.ID)
			if err != nil {
				a.fail(w, r, err)
				return
			}
			defer end()
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), keyID{}, k.ID)))
	})
}

// keyID is where a request's context has the ID of its API key.
type keyID struct{}

// handler is a handler that returns its error instead of writing it, before it
// has begun its answer.
type handler func(http.ResponseWriter, *http.Request) error

func (a *api) do(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			a.fail(w, r, err)
		}
	}
}

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

// verdict is what a client may know of an error.
func verdict(err error) (status int, message string) {
	e, ok := errors.AsType[*control.Error](err)
	if !ok || e.Code == control.CodeInternal {
		return http.StatusInternalServerError, "an internal error; the server's log has the details"
	}
	// The host's memory is what bounds the sandboxes that may run: to the SDKs
	// that is their limit of concurrent sandboxes.
	if ce, ok := errors.AsType[*connect.Error](e.Err); ok && ce.Code() == connect.CodeResourceExhausted {
		return http.StatusTooManyRequests, e.Message
	}
	return statusOf[e.Code], e.Message
}

func (a *api) fail(w http.ResponseWriter, r *http.Request, err error) {
	status, message := verdict(err)
	level := slog.LevelDebug
	if status == http.StatusInternalServerError {
		level = slog.LevelError
	}
	a.log.Log(r.Context(), level, "request failed", "method", r.Method, "path", r.URL.Path, "status", status, "err", err)
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
		var later interface{ RetryAfter() string }
		if errors.As(err, &later) {
			w.Header().Set("Retry-After", later.RetryAfter())
		}
		// The SDKs send such requests again by themselves.
		if e, ok := errors.AsType[*control.Error](err); ok && e.Uncertain {
			w.Header().Set("Should-Retry", "false")
		}
	}
	writeError(w, status, message)
}

// errorBody is the form of all errors.
type errorBody struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

func writeError(w http.ResponseWriter, status int, message string) {
	reply(w, status, errorBody{status, message})
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // a client that has gone needs no answer
}

func (a *api) recoverPanic(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ww := middleware.NewWrapResponseWriter(w, r.ProtoMajor)
		defer func() {
			p := recover()
			if p == nil {
				return
			}
			if p == http.ErrAbortHandler || ww.Status() != 0 {
				panic(http.ErrAbortHandler)
			}
			a.fail(ww, r, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}()
		next.ServeHTTP(ww, r)
	})
}

// decode reads a JSON body into v; no body leaves v as it is.
func decode(w http.ResponseWriter, r *http.Request, v any) error {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	err := dec.Decode(v)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &control.Error{Code: control.CodeTooLarge, Message: fmt.Sprintf("the body must have at most %d bytes", maxBody)}
	}
	if te, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return control.Invalid(te.Field, "must be a %s, not a %s", te.Type, te.Value)
	}
	if err != nil {
		return control.Invalid("body", "is no JSON object: %v", err)
	}
	if dec.More() {
		return control.Invalid("body", "has more than one JSON value")
	}
	return nil
}

// pathID gives the sandbox's ID. Older SDKs append the client's.
func pathID(r *http.Request) (string, error) {
	id, _, _ := strings.Cut(chi.URLParam(r, "id"), "-")
	if control.ValidateID("sandboxID", id) != nil {
		return "", &control.Error{Code: control.CodeNotFound, Message: "there is no such sandbox"}
	}
	return id, nil
}

// pathName gives a template's or snapshot's name, which comes percent-encoded
// and may have a tag.
func pathName(r *http.Request) (string, error) {
	s := chi.URLParam(r, "templateID")
	if r.URL.RawPath != "" { // chi matched the encoded path
		var err error
		if s, err = url.PathUnescape(s); err != nil {
			return "", control.Invalid("templateID", "is not percent-encoded: %v", err)
		}
	}
	return templateName(s), nil
}

// templateName drops the tag that stands for the newest build.
func templateName(s string) string {
	for _, tag := range []string{":default", ":latest"} {
		if rest, ok := strings.CutSuffix(s, tag); ok {
			return rest
		}
	}
	return s
}
