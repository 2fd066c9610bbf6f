package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
)

var (
	// ErrNoSlot: all Max slots are in use.
	ErrNoSlot = errors.New("no network slot is free")
	// ErrSlotLost: the slot, or the part of it that a VM holds, does not exist
	// any more; the sandbox on it cannot be reached again.
	ErrSlotLost = errors.New("network slot is lost")
	// ErrTapBusy: the slot's tap is open already.
	ErrTapBusy = errors.New("tap is in use")
	// ErrReleased: the slot was given back, or its pool closed.
	ErrReleased = errors.New("network slot is released")
	// ErrClosed: the pool is closed.
	ErrClosed = errors.New("network pool is closed")
)

// Egress is what a guest may reach. The zero value is nothing at all.
type Egress struct {
	// AllowInternet opens what neither list names of the public IPv4 internet;
	// private ranges, the host and other sandboxes stay closed whatever the
	// lists say.
	AllowInternet bool
	// Allow and Deny are IPv4 prefixes. Allow goes before Deny.
	Allow, Deny []netip.Prefix
	// Names are allowed as Allow is: the addresses to which the host resolves
	// them when the guest asks. ValidName says what they are.
	Names []string
	// Web, where there is one, takes the guest's connections to WebPorts.
	Web Web
}

func (e Egress) equal(o Egress) bool {
	return e.AllowInternet == o.AllowInternet && slices.Equal(e.Allow, o.Allow) && slices.Equal(e.Deny, o.Deny) &&
		slices.Equal(e.Names, o.Names) && e.Web == o.Web
}

// DefaultEgress is what a fresh slot has.
var DefaultEgress = Egress{AllowInternet: true}

// Slot is the network of one sandbox, from Acquire or Adopt to Release. Its
// methods may be called at the same time from any goroutine.
type Slot struct {
	Index     int
	Netns     string // name in /run/netns
	SandboxID string

	pool *Pool

	mu     sync.RWMutex // read: ns is in use
	ns     *os.File     // nil when released
	egress Egress
	dns    *resolver  // nil where no names are allowed
	web    *webServer // nil where nothing takes the guest's web connections
}

// in runs fn inside the slot's namespace.
func (s *Slot) in(fn func() error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.ns == nil {
		return ErrReleased
	}
	return inNetns(s.pool.home, s.ns, fn)
}

// Egress returns what the guest may reach.
func (s *Slot) Egress() Egress {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.egress
}

// SetEgress changes what the guest may reach, at once and for connections that
// are open too. A fresh slot has DefaultEgress.
func (s *Slot) SetEgress(ctx context.Context, e Egress) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	err := s.setEgress(e)
	over := s.takeUnneeded()
	s.mu.Unlock()
	over() // they may be waiting for mu
	return err
}

// takeUnneeded takes away what the egress has no use for; the result ends it,
// without mu. Held: mu.
func (s *Slot) takeUnneeded() func() {
	var dns *resolver
	var web *webServer
	if s.ns == nil || len(s.egress.Names) == 0 {
		dns, s.dns = s.dns, nil
	}
	if s.ns == nil || s.egress.Web == nil {
		web, s.web = s.web, nil
	}
	return func() { dns.close(); web.close() }
}

// setEgress is SetEgress. Held: mu.
func (s *Slot) setEgress(e Egress) (err error) {
	if s.ns == nil {
		return ErrReleased
	}
	if e.equal(s.egress) {
		return nil
	}
	if len(e.Names) > 0 && s.dns == nil {
		if s.dns, err = s.newResolver(); err != nil {
			return fmt.Errorf("set the egress of slot %d: %w", s.Index, err)
		}
	}
	if e.Web != nil && s.web == nil {
		if s.web, err = s.newWeb(); err != nil {
			return fmt.Errorf("take the web connections of slot %d: %w", s.Index, err)
		}
	}
	s.dns.allow(e.Names)
	err = inNetns(s.pool.home, s.ns, func() error {
		tap, err := netlink.LinkByName(TapName)
		if err != nil {
			return fmt.Errorf("find %s: %w", TapName, err)
		}
		// The mark first: an adoption after a crash loads what it says.
		if err := netlink.LinkSetAlias(tap, e.mark()); err != nil {
			return fmt.Errorf("mark %s: %w", TapName, err)
		}
		return loadSlotRules(e, false)
	})
	if err != nil {
		s.dns.allow(s.egress.Names)
		return fmt.Errorf("set the egress of slot %d: %w", s.Index, err)
	}
	if e.Web != nil && e.Web != s.egress.Web {
		s.web.handle(e.Web.Open(wayOut{s}))
	}
	s.egress = e
	return nil
}

// Release gives the slot back; the VM must be dead. It returns at once: the
// slot is taken apart in the background and Close waits for that. A second
// call does nothing. It works under a cancelled context too.
func (s *Slot) Release(context.Context) error {
	if !s.detach() {
		return nil
	}
	s.pool.reclaim(s.Index)
	return nil
}

// detach ends the use of the namespace; false if it had ended.
func (s *Slot) detach() bool {
	s.mu.Lock()
	if s.ns == nil {
		s.mu.Unlock()
		return false
	}
	s.ns.Close()
	s.ns = nil
	over := s.takeUnneeded()
	s.mu.Unlock()
	over() // their sockets would keep the namespace
	return true
}
