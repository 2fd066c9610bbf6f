package enginetest

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"sync"
	"syscall"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
)

// guests are the agents of all guests: one server, told apart by connection.
type guests struct {
	host  *Host
	conns chan net.Conn
	done  chan struct{}

	mu    sync.Mutex
	lives map[string]string // sandbox to the life that it confirmed last
	// trusts counts how often a sandbox was given the certificate.
	trusts map[string]int
	refuse bool
	// before is called before a guest confirms its identity.
	before func(ctx context.Context, sandbox string)
}

type sandboxKey struct{}

// SandboxOf tells a Host.Guest handler whose guest it is.
func SandboxOf(r *http.Request) string {
	id, _ := r.Context().Value(sandboxKey{}).(string)
	return id
}

func newGuests(t testing.TB, h *Host) *guests {
	g := &guests{host: h, conns: make(chan net.Conn), done: make(chan struct{}), lives: map[string]string{}, trusts: map[string]int{}}
	srv := &http.Server{Handler: g, ConnContext: func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(ctx, sandboxKey{}, c.(guestConn).id)
	}}
	go srv.Serve(g)
	t.Cleanup(func() { srv.Close() })
	return g
}

type guestConn struct {
	net.Conn
	id string
}

func (g *guests) dial(ctx context.Context, id string, port int) (net.Conn, error) {
	if vm, ok := g.host.VM(id); !ok || !vm.Running || port != engine.AgentPort {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	ours, theirs := net.Pipe()
	select {
	case g.conns <- guestConn{theirs, id}:
		return ours, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-g.done:
		return nil, net.ErrClosed
	}
}

// Accept implements net.Listener.
func (g *guests) Accept() (net.Conn, error) {
	select {
	case c := <-g.conns:
		return c, nil
	case <-g.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (g *guests) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.done:
	default:
		close(g.done)
	}
	return nil
}

// Addr implements net.Listener.
func (g *guests) Addr() net.Addr { return &net.UnixAddr{Name: "guests", Net: "unix"} }

// EnvdVersion is what fake guests say that their agent is.
const EnvdVersion = "0.9.9-fake"

func (g *guests) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Header.Get("X-Access-Token") == "":
		http.Error(w, "no token", http.StatusUnauthorized)
	case r.URL.Path == "/init":
		g.init(w, r)
	case r.URL.Path == "/sync":
		w.WriteHeader(http.StatusNoContent)
	case r.URL.Path == "/trust":
		g.trust(w, r)
	case g.host.Guest != nil:
		g.host.Guest.ServeHTTP(w, r)
	default:
		http.NotFound(w, r)
	}
}

// init confirms every step, as a guest that is right does.
func (g *guests) init(w http.ResponseWriter, r *http.Request) {
	var req struct {
		Generation string `json:"generation"`
	}
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	g.mu.Lock()
	before := g.before
	g.mu.Unlock()
	if before != nil {
		before(r.Context(), SandboxOf(r))
	}
	g.mu.Lock()
	g.lives[SandboxOf(r)] = req.Generation
	g.mu.Unlock()
	_ = json.NewEncoder(w).Encode(map[string]any{
		"generation": req.Generation, "envd_version": EnvdVersion,
		"steps": []string{"clock", "entropy", "hostname", "machine_id", "generation", "connections"},
	})
}

func (g *guests) trust(w http.ResponseWriter, r *http.Request) {
	var req struct {
		Certificate string `json:"certificate"`
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.Certificate != string(g.host.authority.PEM()) || g.refuse {
		http.Error(w, "no room for certificates", http.StatusInternalServerError)
		return
	}
	g.trusts[SandboxOf(r)]++
	w.WriteHeader(http.StatusNoContent)
}

// Trusts tells how often a guest wrote down the host's certificate.
func (h *Host) Trusts(id string) int {
	h.guests.mu.Lock()
	defer h.guests.mu.Unlock()
	return h.guests.trusts[id]
}

// RefuseTrust makes guests fail to write the host's certificate.
func (h *Host) RefuseTrust(yes bool) {
	h.guests.mu.Lock()
	defer h.guests.mu.Unlock()
	h.guests.refuse = yes
}

// BeforeInit has f called whenever a guest is asked who it is, or told the time,
// and waited for; its context ends with the question.
func (h *Host) BeforeInit(f func(ctx context.Context, sandbox string)) {
	h.guests.mu.Lock()
	defer h.guests.mu.Unlock()
	h.guests.before = f
}

// Life returns the life that a guest confirmed last.
func (h *Host) Life(id string) string {
	h.guests.mu.Lock()
	defer h.guests.mu.Unlock()
	return h.guests.lives[id]
}
