package enginetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
)

// Network lends slots as hostnet's pool does.
type Network struct {
	host *Host
	// Max bounds the slots; 0 is no bound.
	Max int

	mu      sync.Mutex
	used    map[int]string // slot to sandbox
	orphans map[int]string // of an earlier process, not adopted yet
	egress  map[int]*engine.Egress
}

func newNetwork(h *Host) *Network {
	return &Network{host: h, used: map[int]string{}, orphans: map[int]string{}, egress: map[int]*engine.Egress{}}
}

// Restart makes all slots those of an earlier process.
func (n *Network) Restart() {
	n.mu.Lock()
	defer n.mu.Unlock()
	maps.Copy(n.orphans, n.used)
	clear(n.used)
}

// Sweep frees what no sandbox claimed, as cmd/wrenn has the pool do after the
// engine's start.
func (n *Network) Sweep(keep []int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	maps.DeleteFunc(n.orphans, func(i int, _ string) bool { return !slices.Contains(keep, i) })
}

// Held tells which sandbox holds which slot.
func (n *Network) Held() map[int]string {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := maps.Clone(n.used)
	maps.Copy(out, n.orphans)
	return out
}

// Egress returns what a slot's guest may reach.
func (n *Network) Egress(index int) *engine.Egress {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.egress[index]
}

// Acquire implements engine.Network.
func (n *Network) Acquire(_ context.Context, id string) (engine.Slot, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := 0; n.Max == 0 || i < n.Max; i++ {
		if n.used[i] == "" && n.orphans[i] == "" {
			n.used[i] = id
			return &slot{n: n, index: i, id: id}, nil
		}
	}
	return nil, fmt.Errorf("all slots: %w", hostnet.ErrNoSlot)
}

// Adopt implements engine.Network.
func (n *Network) Adopt(_ context.Context, id string, index int) (engine.Slot, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.used[index] != "":
		return nil, errors.New("it is in use")
	case n.orphans[index] == "":
		return nil, fmt.Errorf("slot %d: %w", index, hostnet.ErrSlotLost)
	case n.orphans[index] != id:
		n.host.note("sandbox %s adopts slot %d of %s", id, index, n.orphans[index])
	}
	delete(n.orphans, index)
	n.used[index] = id
	return &slot{n: n, index: index, id: id}, nil
}

type slot struct {
	n     *Network
	index int
	id    string
}

func (s *slot) Index() int                 { return s.index }
func (s *slot) OpenTap() (*os.File, error) { return os.Open(os.DevNull) }

func (s *slot) SetEgress(_ context.Context, e *engine.Egress) error {
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	s.n.egress[s.index] = e
	return nil
}

// Release gives the slot back; a second time does nothing.
func (s *slot) Release(context.Context) error {
	if _, lives := s.n.host.VM(s.id); lives {
		s.n.host.note("the slot of %s is released while its VM lives", s.id)
	}
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	if s.n.used[s.index] == s.id {
		delete(s.n.used, s.index)
		delete(s.n.egress, s.index)
	}
	return nil
}

// Dial reaches the guest: one whose VM stands still or is gone does not answer.
func (s *slot) Dial(ctx context.Context, port int) (net.Conn, error) {
	return s.n.host.guests.dial(ctx, s.id, port)
}
