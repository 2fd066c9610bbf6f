package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"sync"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
)

// tunnelChunk is the most that one message of a tunnel carries.
const tunnelChunk = 64 << 10

func egressOf(e *Egress) *hostagentv1.Egress {
	if e == nil {
		return nil
	}
	out := &hostagentv1.Egress{DenyInternet: e.Internet != nil && !*e.Internet, Allow: e.open(), Deny: e.Deny}
	for host, rules := range e.Rules {
		if out.Headers == nil {
			out.Headers = map[string]*hostagentv1.Headers{}
		}
		set := map[string]string{}
		for _, r := range rules {
			maps.Copy(set, r.Headers)
		}
		out.Headers[host] = &hostagentv1.Headers{Set: set}
	}
	return out
}

func (h *hostClient) SetEgress(ctx context.Context, id string, e *Egress) error {
	_, err := h.c.SetSandboxEgress(ctx, connect.NewRequest(&hostagentv1.SetSandboxEgressRequest{SandboxId: id, Egress: egressOf(e)}))
	return hostError(err)
}

func (h *hostClient) AccessToken(ctx context.Context, id string) (string, error) {
	r, err := h.c.GetSandboxAccess(ctx, connect.NewRequest(&hostagentv1.GetSandboxAccessRequest{SandboxId: id}))
	if err != nil {
		return "", hostError(err)
	}
	return r.Msg.GetAccessToken(), nil
}

// Dial opens a tunnel, which lives until it is closed: ctx bounds the opening.
func (h *hostClient) Dial(ctx context.Context, id string, port int) (net.Conn, error) {
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	t := &tunnel{st: h.c.Tunnel(run), cancel: cancel, name: tunnelAddr(fmt.Sprintf("%s:%d", id, port))}
	err := t.st.Send(&hostagentv1.TunnelRequest{Message: &hostagentv1.TunnelRequest_Open{
		Open: &hostagentv1.TunnelOpen{SandboxId: id, Port: uint32(port)},
	}})
	if err == nil || errors.Is(err, io.EOF) { // EOF: the answer says why
		_, err = t.st.Receive()
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err == nil {
		return t, nil
	}
	t.Close()
	if ce, ok := errors.AsType[*connect.Error](err); ok && ce.Code() == connect.CodeOutOfRange {
		return nil, &Error{Code: CodeInvalidState, Message: ce.Message(), Err: errors.Join(ErrPortClosed, err)}
	}
	return nil, hostError(err)
}

// tunnel is a Tunnel call as a connection. It has no deadlines.
type tunnel struct {
	st     *connect.BidiStreamForClient[hostagentv1.TunnelRequest, hostagentv1.TunnelResponse]
	cancel context.CancelFunc
	name   tunnelAddr
	rest   []byte // received and not read yet
	once   sync.Once
}

func (t *tunnel) Read(p []byte) (int, error) {
	for len(t.rest) == 0 {
		m, err := t.st.Receive()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return 0, io.EOF
			}
			return 0, &net.OpError{Op: "read", Net: "tunnel", Addr: t.name, Err: err}
		}
		t.rest = m.GetData()
	}
	n := copy(p, t.rest)
	t.rest = t.rest[n:]
	return n, nil
}

func (t *tunnel) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		piece := p[done:min(len(p), done+tunnelChunk)]
		err := t.st.Send(&hostagentv1.TunnelRequest{Message: &hostagentv1.TunnelRequest_Data{Data: piece}})
		if err != nil {
			return done, &net.OpError{Op: "write", Net: "tunnel", Addr: t.name, Err: err}
		}
		done += len(piece)
	}
	return len(p), nil
}

// CloseWrite ends the sending direction.
func (t *tunnel) CloseWrite() error { return t.st.CloseRequest() }

// Close ends both directions; calls under way return. The transport looks at
// its context again only when the request has ended.
func (t *tunnel) Close() error {
	t.once.Do(func() {
		t.cancel()
		_ = t.st.CloseRequest() // of a stream that has ended it is nothing
	})
	return nil
}

func (t *tunnel) LocalAddr() net.Addr              { return tunnelAddr("proxy") }
func (t *tunnel) RemoteAddr() net.Addr             { return t.name }
func (t *tunnel) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (t *tunnel) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (t *tunnel) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

type tunnelAddr string

func (tunnelAddr) Network() string  { return "tunnel" }
func (a tunnelAddr) String() string { return string(a) }
