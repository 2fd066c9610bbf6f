package engine

import (
	"context"
	"fmt"
	"net"
)

// DialGuest connects to a TCP port of a running sandbox. The socket is made in
// the sandbox's own network namespace and goes to the guest's fixed address, so
// nothing that a guest says can lead it elsewhere. The connection ends with the
// sandbox's present run at the latest. A port that nobody listens on is an
// ECONNREFUSED; a silent guest is waited for until ctx ends.
func (e *Engine) DialGuest(ctx context.Context, id string, port int) (net.Conn, error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("%w: port %d must be 1 to 65535", ErrInvalid, port)
	}
	g, err := e.Guest(id)
	if err != nil {
		return nil, err
	}
	return g.dial(ctx, port)
}

// AccessToken is what the sandbox's guest agent asks of its callers; it stays
// the same for the sandbox's whole life.
func (e *Engine) AccessToken(id string) (string, error) {
	sb, err := e.find(id)
	if err != nil {
		return "", err
	}
	return sb.journal().AccessToken, nil
}
