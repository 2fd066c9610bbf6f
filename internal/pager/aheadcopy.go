package pager

import (
	"context"
	"fmt"
	"slices"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// In copy mode there is nothing to read into before a VMM hands its memory over,
// and from then on until its guest runs every moment is waited for. So only what
// loading its state needs is put in then: the queues of the devices, which come
// first in an order, as it is one of first touch. The rest follows when the
// engine says that the VM runs.

const (
	// firstAhead is how much of an order is put in at the hand-over, in clusters:
	// 256 KiB. A load touches three.
	firstAhead = 4
	// maxCopied bounds an order of copy mode, in clusters: 64 MiB.
	maxCopied = 1024
)

// orderOf gives what starts of an image need of it in copy mode.
func (s *Server) orderOf(i *image) []uint32 {
	order, err := s.orders.load(i.id, i.source.Header().Parent, s.faults.ClusterSize())
	if err != nil {
		s.log.Warn("nothing is read ahead", "image", i.id, "err", err)
	}
	return order[:min(len(order), maxCopied)]
}

// ReadAhead implements pager.v1.
func (s *Server) ReadAhead(_ context.Context, req *connect.Request[pagerv1.ReadAheadRequest]) (*connect.Response[pagerv1.ReadAheadResponse], error) {
	id := req.Msg.SandboxId
	s.mu.Lock()
	g := s.guests[id]
	s.mu.Unlock()
	if g == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("sandbox %q is not served here", id))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if m := g.memory; m != nil && m.handover != nil {
		m.runs = true
		if m.attached != nil { // else it is about to be
			s.putAhead(id, m, len(m.order))
		}
	}
	return connect.NewResponse(&pagerv1.ReadAheadResponse{}), nil
}

// attachedCopy begins to put what a start needs into memory that was just handed
// over. The guest's lock is held.
func (s *Server) attachedCopy(id string, m *memory) {
	if m.runs {
		s.putAhead(id, m, len(m.order))
	} else {
		s.putAhead(id, m, firstAhead)
	}
}

// putAhead puts the first n clusters of an order in, unless it was given them.
// It ends with the attachment. The guest's lock is held.
func (s *Server) putAhead(id string, m *memory, n int) {
	clusters := m.order[m.given:max(m.given, min(n, len(m.order)))]
	if len(clusters) == 0 {
		return
	}
	m.given += len(clusters)
	m.putting.Go(func() {
		if _, err := s.faults.PrefetchCopy(context.Background(), id, clusters); err != nil {
			s.log.Warn("reading ahead ended early", "sandbox", id, "err", err)
		}
	})
}

// learnCopy adds what a start in copy mode missed to what is put ahead. What of
// that was used cannot be told: it raises no fault, and keeps its place. Where
// there is too much of it, it begins anew behind what loading needs.
func (s *Server) learnCopy(m *memory, touched []uint32) error {
	known := map[uint32]bool{}
	for _, c := range m.order {
		known[c] = true
	}
	missed := slices.DeleteFunc(slices.Clone(touched), func(c uint32) bool { return known[c] })
	if len(missed) == 0 {
		return nil
	}
	order := slices.Concat(m.order, missed)
	if len(order) > maxCopied {
		order = slices.Concat(m.order[:min(len(m.order), firstAhead)], missed)
		order = order[:min(len(order), maxCopied)]
	}
	return s.orders.save(uffd.Order{Image: m.image.id, ClusterSize: s.faults.ClusterSize(), Clusters: order})
}
