package controltest

import (
	"context"
	"net"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// OnDial says what connections into sandboxes lead to.
func (h *Host) OnDial(dial func(id string, port int) (net.Conn, error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dial = dial
}

// Token is the access token of a sandbox.
func Token(id string) string { return "token-of-" + id }

// AccessToken implements control.Host.
func (h *Host) AccessToken(_ context.Context, id string) (string, error) {
	if err := h.enter("access"); err != nil {
		return "", err
	}
	if _, ok := h.Has(id); !ok {
		return "", Err(control.CodeNotFound, "no sandbox %s", id)
	}
	return Token(id), nil
}

// Dial implements control.Host.
func (h *Host) Dial(_ context.Context, id string, port int) (net.Conn, error) {
	if err := h.enter("dial"); err != nil {
		return nil, err
	}
	if _, err := h.live(id); err != nil {
		return nil, err
	}
	h.mu.Lock()
	dial := h.dial
	h.mu.Unlock()
	if dial == nil {
		return nil, &control.Error{Code: control.CodeInvalidState, Message: "nothing listens", Err: control.ErrPortClosed}
	}
	return dial(id, port)
}

// SetEgress implements control.Host.
func (h *Host) SetEgress(_ context.Context, id string, e *control.Egress) error {
	if err := h.enter("egress"); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.sandboxes[id]
	if s == nil {
		return Err(control.CodeNotFound, "no sandbox %s", id)
	}
	s.egress = e
	return nil
}

// Egress is what a sandbox's guest may reach.
func (h *Host) Egress(id string) *control.Egress {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sandboxes[id].egress
}

// Rebooted tells whether a sandbox's present run began from its disk alone.
func (h *Host) Rebooted(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sandboxes[id].rebooted
}
