package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/egress"
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// Egress is what a guest may reach of the public IPv4 internet: prefixes in
// the form 192.0.2.0/24. Allowed ones, which may also be names, go before
// denied ones.
type Egress struct {
	DenyInternet bool     `json:"deny_internet,omitempty"`
	Allow        []string `json:"allow,omitempty"`
	Deny         []string `json:"deny,omitempty"`
	// Headers are set in the guest's requests to hosts.
	Headers egress.Rules `json:"headers,omitempty"`
}

// maxEgress bounds each list of an Egress: the control plane's own bound, and
// some addresses that it adds.
const maxEgress = 256 + 16

func (e *Egress) check() error {
	if e == nil {
		return nil
	}
	if len(e.Allow) > maxEgress || len(e.Deny) > maxEgress {
		return fmt.Errorf("%w: egress: each list must have at most %d prefixes", ErrInvalid, maxEgress)
	}
	for i, l := range [][]string{e.Allow, e.Deny} {
		for _, s := range l {
			if i == 0 && hostnet.ValidName(s) {
				continue
			}
			if p, err := netip.ParsePrefix(s); err != nil || !p.Addr().Is4() {
				return fmt.Errorf("%w: egress: %.64q is no IPv4 prefix, nor a name that is allowed", ErrInvalid, s)
			}
		}
	}
	if err := e.Headers.Check(hostnet.ValidName); err != nil {
		return fmt.Errorf("%w: egress: headers: %w", ErrInvalid, err)
	}
	return nil
}

// SetEgress replaces what a running or paused sandbox's guest may reach, at
// once and for all its later runs.
func (e *Engine) SetEgress(ctx context.Context, id string, to *Egress) error {
	ctx = context.WithoutCancel(ctx)
	if err := to.check(); err != nil {
		return err
	}
	sb, err := e.find(id)
	if err != nil {
		return err
	}
	if err := sb.begin("change the network of", Running, Paused); err != nil {
		return err
	}
	defer sb.end()
	w := &rewiring{e: e, sb: sb, to: to}
	old := sb.journal().Egress
	if err := e.perform(ctx, OpEgress, e.newPhases(), w.steps()); err != nil {
		w.to = old
		back := sb.settle(func(j *journal) { j.Egress = old })
		return errors.Join(fmt.Errorf("change the network of sandbox %s: %w", id, err), back, w.apply(ctx))
	}
	return nil
}

// rewiring changes what a guest may reach.
type rewiring struct {
	e  *Engine
	sb *sandbox
	to *Egress
}

func (w *rewiring) steps() []step {
	return []step{
		// The journal first: who takes the sandbox over loads what it says.
		{name: "record", do: func(context.Context) error { return w.sb.update(func(j *journal) { j.Egress = w.to }) }},
		{name: "guest_trust", do: w.trust},
		{name: "apply", do: w.apply},
	}
}

// trust: a guest whose requests are completed must know our certificates.
func (w *rewiring) trust(ctx context.Context) error {
	if r := w.sb.current(); r != nil {
		return w.e.trust(ctx, r.guest, w.to)
	}
	return nil
}

// trustLimit bounds the wait for a guest that writes down whom it trusts.
const trustLimit = 30 * time.Second

// trust makes a guest trust the certificates that its requests are taken with,
// where there are headers to set.
func (e *Engine) trust(ctx context.Context, g *Guest, to *Egress) error {
	if to == nil || len(to.Headers) == 0 || e.opts.Authority == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, trustLimit)
	defer cancel()
	if _, err := g.post(ctx, "/trust", map[string]string{"certificate": string(e.opts.Authority.PEM())}); err != nil {
		return fmt.Errorf("make the guest trust the host's certificates: %w", err)
	}
	return nil
}

func (w *rewiring) apply(ctx context.Context) error {
	if r := w.sb.current(); r != nil {
		return r.slot.SetEgress(ctx, w.to)
	}
	return nil
}

// rebootSource is the disk of a pause with a kernel to boot it: that of the
// base template, whose modules are in its initrd and not on the disk.
func (e *Engine) rebootSource(m snapshot.Manifest) (source, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	b, ok := e.bases["base"]
	if !ok {
		return source{}, fmt.Errorf("%w: there is no base template to boot with", ErrState)
	}
	b.Disk = m.Disk.ID
	return source{base: &b}, nil
}
