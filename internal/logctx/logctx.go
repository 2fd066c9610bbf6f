// Package logctx carries what every line of the log should tell: the ID of the
// request that something is done for, and the sandbox that it is done to. Both
// go along with contexts, and from the control plane to the host agent with its
// calls.
//
// It is a leaf: whoever logs may import it.
package logctx

import (
	"context"
	"log/slog"
	"regexp"

	"connectrpc.com/connect"
)

// The keys of the log's fields, and the header that carries the request's ID.
const (
	RequestKey = "request_id"
	SandboxKey = "sandbox"
	Header     = "X-Request-Id"
)

type (
	requestKey struct{}
	sandboxKey struct{}
)

// sound is what is taken over from a caller; it goes into logs.
var sound = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// Sound tells whether a caller's request ID may be used.
func Sound(id string) bool { return sound.MatchString(id) }

// WithRequest marks what is done under ctx with the ID of a request.
func WithRequest(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, requestKey{}, id)
}

// Request gives the ID of the request that ctx belongs to, or nothing.
func Request(ctx context.Context) string {
	id, _ := ctx.Value(requestKey{}).(string)
	return id
}

// WithSandbox marks what is done under ctx with the sandbox that it is done to.
func WithSandbox(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, sandboxKey{}, id)
}

// Handler adds to each record what its context carries, where the record itself
// does not say it.
func Handler(next slog.Handler) slog.Handler { return handler{next, nil} }

type handler struct {
	slog.Handler
	// has are the keys that With gave to the logger.
	has map[string]bool
}

func (h handler) Handle(ctx context.Context, r slog.Record) error {
	request, _ := ctx.Value(requestKey{}).(string)
	sandbox, _ := ctx.Value(sandboxKey{}).(string)
	if request == "" && sandbox == "" {
		return h.Handler.Handle(ctx, r)
	}
	has := map[string]bool{RequestKey: h.has[RequestKey], SandboxKey: h.has[SandboxKey]}
	r.Attrs(func(a slog.Attr) bool { has[a.Key] = true; return true })
	r = r.Clone()
	for key, value := range map[string]string{RequestKey: request, SandboxKey: sandbox} {
		if value != "" && !has[key] {
			r.AddAttrs(slog.String(key, value))
		}
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	has := map[string]bool{RequestKey: h.has[RequestKey], SandboxKey: h.has[SandboxKey]}
	for _, a := range attrs {
		has[a.Key] = true
	}
	return handler{h.Handler.WithAttrs(attrs), has}
}

// WithGroup implements slog.Handler.
func (h handler) WithGroup(name string) slog.Handler {
	return handler{h.Handler.WithGroup(name), h.has}
}

// Interceptor sends the request's ID along with calls, and takes it from them.
type Interceptor struct{}

var _ connect.Interceptor = Interceptor{}

// WrapUnary implements connect.Interceptor.
func (Interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if req.Spec().IsClient {
			if id := Request(ctx); id != "" {
				req.Header().Set(Header, id)
			}
		} else if id := req.Header().Get(Header); Sound(id) {
			ctx = WithRequest(ctx, id)
		}
		return next(ctx, req)
	}
}

// WrapStreamingClient implements connect.Interceptor.
func (Interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		if id := Request(ctx); id != "" {
			conn.RequestHeader().Set(Header, id)
		}
		return conn
	}
}

// WrapStreamingHandler implements connect.Interceptor.
func (Interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if id := conn.RequestHeader().Get(Header); Sound(id) {
			ctx = WithRequest(ctx, id)
		}
		return next(ctx, conn)
	}
}
