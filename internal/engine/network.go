package engine

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"git.omukk.dev/wrenn/sandbox/internal/egress"
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
	"git.omukk.dev/wrenn/sandbox/internal/localca"
)

// HostNetwork lends the slots of a pool. By ca hosts are certified to guests
// whose requests are completed.
func HostNetwork(p *hostnet.Pool, ca *localca.Authority, log *slog.Logger) Network {
	return hostNetwork{p, ca, log}
}

type hostNetwork struct {
	pool *hostnet.Pool
	ca   *localca.Authority
	log  *slog.Logger
}

func (n hostNetwork) Acquire(ctx context.Context, id string) (Slot, error) {
	s, err := n.pool.Acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	return hostSlot{s, n}, nil
}

func (n hostNetwork) Adopt(ctx context.Context, id string, index int) (Slot, error) {
	s, err := n.pool.Adopt(ctx, id, index)
	if err != nil {
		return nil, err
	}
	return hostSlot{s, n}, nil
}

type hostSlot struct {
	slot *hostnet.Slot
	net  hostNetwork
}

func (s hostSlot) Tap() (name, netns string) {
	return hostnet.TapName, filepath.Join("/run/netns", s.slot.Netns)
}
func (s hostSlot) Index() int                 { return s.slot.Index }
func (s hostSlot) OpenTap() (*os.File, error) { return s.slot.OpenTap() }
func (s hostSlot) Dial(ctx context.Context, port int) (net.Conn, error) {
	return s.slot.Dial(ctx, port)
}
func (s hostSlot) SetEgress(ctx context.Context, e *Egress) error {
	h := hostnet.DefaultEgress
	if e != nil {
		h.AllowInternet = !e.DenyInternet
		h.Names, h.Allow = split(e.Allow)
		_, h.Deny = split(e.Deny)
		if len(e.Headers) > 0 {
			h.Web = egress.New(egress.Options{Rules: e.Headers, Authority: s.net.ca, Logger: s.net.log})
		}
	}
	return s.slot.SetEgress(ctx, h)
}

// split reads what Egress.check has passed.
func split(list []string) (names []string, prefixes []netip.Prefix) {
	for _, s := range list {
		if hostnet.ValidName(s) {
			names = append(names, s)
		} else {
			prefixes = append(prefixes, netip.MustParsePrefix(s))
		}
	}
	return names, prefixes
}

func (s hostSlot) Release(ctx context.Context) error { return s.slot.Release(ctx) }
