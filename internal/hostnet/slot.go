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
}

func (e Egress) equal(o Egress) bool {
	return e.AllowInternet == o.AllowInternet && slices.Equal(e.Allow, o.Allow) && slices.Equal(e.Deny, o.Deny) &&
		slices.Equal(e.Names, o.Names)
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
	dns    *resolver // nil where no names are allowed
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
	old, err := s.setEgress(e)
	s.mu.Unlock()
	old.close() // it may be waiting for mu
	return err
}

// setEgress is SetEgress. It returns the resolver that is not needed any more.
// Held: mu.
func (s *Slot) setEgress(e Egress) (old *resolver, err error) {
	if s.ns == nil {
		return nil, ErrReleased
	}
	if e.equal(s.egress) {
		return nil, nil
	}
	if len(e.Names) > 0 && s.dns == nil {
		if s.dns, err = s.newResolver(); err != nil {
			return nil, fmt.Errorf("set the egress of slot %d: %w", s.Index, err)
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
		return nil, fmt.Errorf("set the egress of slot %d: %w", s.Index, err)
	}
	s.egress = e
	if len(e.Names) == 0 {
		old, s.dns = s.dns, nil
	}
	return old, nil
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
	dns := s.dns
	s.ns, s.dns = nil, nil
	s.mu.Unlock()
	dns.close() // its socket would keep the namespace
	return true
}
