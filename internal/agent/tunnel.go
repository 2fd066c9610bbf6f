package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	agentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
)

const (
	// tunnelDial bounds the wait for a guest that does not answer: a busy one
	// takes its time.
	tunnelDial = 30 * time.Second
	// tunnelChunk is the most that one message carries.
	tunnelChunk = 64 << 10
)

// GetSandboxAccess implements hostagent.v1.
func (a *Agent) GetSandboxAccess(ctx context.Context, req *connect.Request[agentv1.GetSandboxAccessRequest]) (*connect.Response[agentv1.GetSandboxAccessResponse], error) {
	token, err := a.engine.AccessToken(req.Msg.SandboxId)
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	return connect.NewResponse(&agentv1.GetSandboxAccessResponse{AccessToken: token}), nil
}

// Tunnel implements hostagent.v1.
func (a *Agent) Tunnel(ctx context.Context, stream *connect.BidiStream[agentv1.TunnelRequest, agentv1.TunnelResponse]) error {
	first, err := stream.Receive()
	if err != nil {
		return a.wire(ctx, fmt.Errorf("%w: the tunnel's first message did not come: %v", engine.ErrInvalid, err))
	}
	open := first.GetOpen()
	if open == nil {
		return a.wire(ctx, fmt.Errorf("%w: the tunnel's first message must be open", engine.ErrInvalid))
	}
	conn, err := a.dialGuest(ctx, open.SandboxId, int(open.Port))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := stream.Send(&agentv1.TunnelResponse{Message: &agentv1.TunnelResponse_Open{Open: &agentv1.TunnelOpened{}}}); err != nil {
		return err
	}
	// A caller that goes away ends ctx, which unblocks both directions.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	go sendToGuest(stream, conn)
	return sendToCaller(stream, conn)
}

func (a *Agent) dialGuest(ctx context.Context, id string, port int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, tunnelDial)
	defer cancel()
	conn, err := a.engine.DialGuest(ctx, id, port)
	switch {
	case err == nil:
		return conn, nil
	case errors.Is(err, engine.ErrInvalid), errors.Is(err, engine.ErrNotFound), errors.Is(err, engine.ErrState):
		return nil, a.wire(ctx, err)
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, connect.NewError(connect.CodeOutOfRange, fmt.Errorf("nothing listens on port %d of sandbox %s", port, id))
	}
	return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("port %d of sandbox %s does not answer: %w", port, id, err))
}

// sendToGuest ends when the caller has sent everything or either side is gone:
// the handler's return ends the stream.
func sendToGuest(stream *connect.BidiStream[agentv1.TunnelRequest, agentv1.TunnelResponse], conn net.Conn) {
	for {
		m, err := stream.Receive()
		if err != nil {
			if w, ok := conn.(interface{ CloseWrite() error }); ok && errors.Is(err, io.EOF) {
				w.CloseWrite()
			} else {
				conn.Close()
			}
			return
		}
		if _, err := conn.Write(m.GetData()); err != nil {
			conn.Close()
			return
		}
	}
}

func sendToCaller(stream *connect.BidiStream[agentv1.TunnelRequest, agentv1.TunnelResponse], conn net.Conn) error {
	buf := make([]byte, tunnelChunk)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if err := stream.Send(&agentv1.TunnelResponse{Message: &agentv1.TunnelResponse_Data{Data: buf[:n]}}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return connect.NewError(connect.CodeUnavailable, fmt.Errorf("the connection into the sandbox broke: %w", err))
		}
	}
}

func egressOf(e *agentv1.Egress) *engine.Egress {
	if e == nil {
		return nil
	}
	out := &engine.Egress{DenyInternet: e.DenyInternet, Allow: e.Allow, Deny: e.Deny}
	for host, h := range e.Headers {
		if out.Headers == nil {
			out.Headers = map[string]map[string]string{}
		}
		out.Headers[host] = h.GetSet()
	}
	return out
}

// SetSandboxEgress implements hostagent.v1.
func (a *Agent) SetSandboxEgress(ctx context.Context, req *connect.Request[agentv1.SetSandboxEgressRequest]) (*connect.Response[agentv1.SetSandboxEgressResponse], error) {
	if err := a.engine.SetEgress(ctx, req.Msg.SandboxId, egressOf(req.Msg.Egress)); err != nil {
		return nil, a.wire(ctx, err)
	}
	return connect.NewResponse(&agentv1.SetSandboxEgressResponse{}), nil
}
