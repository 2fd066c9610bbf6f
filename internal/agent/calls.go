package agent

import (
	"context"
	"log/slog"
	"path"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/logctx"
)

// changes are the calls that change a sandbox or snapshot: each has a line in
// the log. The others come many times a second, and have one for who looks
// closer.
var changes = map[string]bool{
	"CreateSandbox": true, "DestroySandbox": true, "PauseSandbox": true, "ResumeSandbox": true,
	"CreateSnapshot": true, "DeleteSnapshot": true, "SetSandboxEgress": true, "CollectGarbage": true,
}

// LogCalls logs calls when they have ended, with the request that they are made
// for and their sandbox, which lines in between have too.
func LogCalls(log *slog.Logger) connect.Interceptor { return calls{log} }

type calls struct{ log *slog.Logger }

// sandboxOfCall reads the sandbox off a request.
func sandboxOfCall(msg any) string {
	switch m := msg.(type) {
	case interface{ GetSandboxId() string }:
		return m.GetSandboxId()
	case interface{ GetId() string }:
		return m.GetId()
	}
	return ""
}

func (c calls) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if id := sandboxOfCall(req.Any()); id != "" {
			ctx = logctx.WithSandbox(ctx, id)
		}
		began := time.Now()
		resp, err := next(ctx, req)
		c.ended(ctx, req.Spec(), began, err)
		return resp, err
	}
}

func (c calls) ended(ctx context.Context, spec connect.Spec, began time.Time, err error) {
	name := path.Base(spec.Procedure)
	level, args := slog.LevelDebug, []any{"call", name, "took", time.Since(began)}
	if changes[name] {
		level = slog.LevelInfo
	}
	if err != nil {
		args = append(args, "code", connect.CodeOf(err).String(), "err", err)
	}
	c.log.Log(ctx, level, "host agent: call", args...)
}

// WrapStreamingClient implements connect.Interceptor.
func (c calls) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements connect.Interceptor. Whose stream it is, its
// first message tells, which is the handler's.
func (c calls) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		began := time.Now()
		err := next(ctx, conn)
		c.ended(ctx, conn.Spec(), began, err)
		return err
	}
}
