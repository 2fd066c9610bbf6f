package httpapi

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/logctx"
)

const requestIDHeader = logctx.Header

type apiKeyKey struct{}

// apiKeyOf gives the ID of the API key that a request was let in with.
func apiKeyOf(r *http.Request) string {
	id, _ := r.Context().Value(apiKeyKey{}).(string)
	return id
}

// requestID gives each request an ID, the caller's own if it is a sound one.
func (a *api) requestID(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get(requestIDHeader)
		if !logctx.Sound(id) {
			id = rand.Text()
		}
		w.Header().Set(requestIDHeader, id)
		next.ServeHTTP(w, r.WithContext(control.WithRequestID(r.Context(), id)))
	})
}

func requestIDOf(r *http.Request) string { return control.RequestID(r.Context()) }

// record logs and counts each request when it has ended.
func (a *api) record(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		ww := middleware.NewWrapResponseWriter(w, r.ProtoMajor)
		defer func() {
			status := ww.Status()
			if status == 0 {
				status = http.StatusOK
			}
			// The pattern, not the path: its values are bounded.
			route := chi.RouteContext(r.Context()).RoutePattern()
			took := time.Since(start)
			a.metrics.request(route, r.Method, status, took)
			a.log.DebugContext(r.Context(), "request", "request_id", requestIDOf(r), "method", r.Method,
				"path", r.URL.Path, "status", status, "took", took)
		}()
		next.ServeHTTP(ww, r)
	})
}

// recoverPanic turns a panic into a 500. http.ErrAbortHandler goes on: it
// breaks the connection of an answer that cannot be completed.
func (a *api) recoverPanic(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			p := recover()
			if p == nil {
				return
			}
			if p == http.ErrAbortHandler {
				panic(p)
			}
			err := fmt.Errorf("panic: %v\n%s", p, debug.Stack())
			if ww, ok := w.(middleware.WrapResponseWriter); ok && ww.Status() != 0 {
				a.log.ErrorContext(r.Context(), "panic after the answer had begun", "request_id", requestIDOf(r), "err", err)
				panic(http.ErrAbortHandler)
			}
			a.fail(w, r, err)
		}()
		next.ServeHTTP(w, r)
	})
}

// authenticate lets in who has a key.
func (a *api) authenticate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := r.Header.Get("X-API-Key")
		if key == "" {
			if scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
				key = strings.TrimSpace(token)
			}
		}
		row, err := a.svc.Authenticate(r.Context(), key)
		if err != nil {
			if control.CodeOf(err) == control.CodeUnauthorized {
				w.Header().Set("WWW-Authenticate", `Bearer realm="wrenn"`)
			}
			a.fail(w, r, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), apiKeyKey{}, row.ID)))
	})
}
