package pager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

const (
	// maxAhead bounds what is read ahead of one start, in clusters: 512 MiB.
	maxAhead = 8192
	// maxOrders bounds how many images' orders are kept, the newest ones.
	maxOrders   = 256
	orderSuffix = ".order"
)

// orders keeps which clusters the cold starts of images needed, one small file
// each. They are hints: one that is lost or damaged is as if never written, so
// nothing is synced. The zero value keeps none.
type orders struct{ dir string }

func (o orders) path(id format.ID) string { return filepath.Join(o.dir, id.String()+orderSuffix) }

// load gives the order of an image, or of the one that it was made from: a
// resume needs about what the resume before it needed.
func (o orders) load(id, parent format.ID, clusterSize int) ([]uint32, error) {
	if o.dir == "" {
		return nil, nil
	}
	for _, from := range []format.ID{id, parent} {
		if from.IsZero() {
			continue
		}
		b, err := os.ReadFile(o.path(from))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var got uffd.Order
		if err == nil {
			got, err = uffd.DecodeOrder(b)
		}
		if err == nil && (got.Image != from || got.ClusterSize != clusterSize) {
			err = errors.New("it is of another image or cluster size")
		}
		if err != nil {
			return nil, fmt.Errorf("order of image %s: %w", from, err)
		}
		return got.Clusters[:min(len(got.Clusters), maxAhead)], nil
	}
	return nil, nil
}

func (o orders) save(order uffd.Order) error {
	if o.dir == "" {
		return nil
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of orders: %w", err)
	}
	path := o.path(order.Image)
	if err := os.WriteFile(path+".tmp", order.Encode(), 0o600); err != nil {
		return fmt.Errorf("write an order: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("put an order in place: %w", err)
	}
	return o.prune()
}

// prune removes the oldest orders beyond maxOrders.
func (o orders) prune() error {
	entries, err := os.ReadDir(o.dir)
	if err != nil || len(entries) <= maxOrders {
		return err
	}
	age := map[string]time.Time{}
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			age[e.Name()] = info.ModTime()
		}
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int {
		return cmp.Or(age[a.Name()].Compare(age[b.Name()]), cmp.Compare(a.Name(), b.Name()))
	})
	var errs []error
	for _, e := range entries[:len(entries)-maxOrders] {
		errs = append(errs, os.Remove(filepath.Join(o.dir, e.Name())))
	}
	return errors.Join(errs...)
}

func (o orders) remove(id format.ID) error {
	if o.dir == "" {
		return nil
	}
	if err := os.Remove(o.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove an order: %w", err)
	}
	return nil
}

// ahead is the reading ahead for one cold start of a shared image.
type ahead struct {
	order  []uint32
	cancel context.CancelFunc
	done   chan struct{} // closed when it has read all, or failed
	err    error
	// watched is the sandbox whose start tells what was needed, "" as long as
	// none is attached. Guarded by Server.mu.
	watched string
	result  *pagerv1.Prefetch
}

// readAhead begins to read what the last cold start of an image needed, while
// its VMM is still being started.
func (s *Server) readAhead(i *image) *ahead {
	ctx, cancel := context.WithCancel(context.Background())
	a := &ahead{cancel: cancel, done: make(chan struct{})}
	var err error
	if a.order, err = s.orders.load(i.id, i.source.Header().Parent, s.faults.ClusterSize()); err != nil {
		s.log.Warn("nothing is read ahead", "image", i.id, "err", err)
	}
	go func() {
		defer close(a.done)
		if len(a.order) == 0 {
			return
		}
		var n int64
		if n, a.err = s.faults.Prefetch(ctx, i.shared, a.order); a.err != nil && ctx.Err() == nil {
			s.log.Warn("reading ahead ended early", "image", i.id, "bytes", n, "err", a.err)
		}
	}()
	return a
}

// stop ends the reading; the shared image is not used any more on return.
func (a *ahead) stop() {
	a.cancel()
	<-a.done
}

// watch has the start of a sandbox tell, after the window, what was needed.
// The guest's lock is held.
func (s *Server) watch(id string, g *guest) {
	if s.opts.OrderDir == "" {
		return
	}
	if g.memory.handover != nil {
		s.attachedCopy(id, g.memory)
	} else {
		a := g.memory.image.ahead
		s.mu.Lock()
		mine := a != nil && a.watched == ""
		if mine {
			a.watched = id
		}
		s.mu.Unlock()
		if !mine {
			return
		}
	}
	m := g.memory
	m.window = time.AfterFunc(s.opts.OrderWindow, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.memory == m {
			s.learn(id, m)
		}
	})
}

// learn stores what the start of a sandbox needed, for the next cold start,
// and judges what was read ahead of this one. It does so once. The guest's lock
// is held.
func (s *Server) learn(id string, m *memory) {
	if m.window == nil || m.learned {
		return
	}
	m.window.Stop()
	m.learned = true
	touched, err := s.faults.Touched(id)
	if err == nil && m.handover != nil {
		err = s.learnCopy(m, touched)
	} else if err == nil {
		err = s.learnShared(id, m, touched)
	}
	if err != nil {
		s.log.Warn("what a start needed is not known", "sandbox", id, "err", err)
	}
}

func (s *Server) learnShared(id string, m *memory, touched []uint32) (err error) {
	var used []uint32
	if a := m.image.ahead; len(a.order) > 0 {
		if used, err = s.judge(id, a, touched); errors.Is(err, uffd.ErrGone) {
			// Ended within the window: what it used cannot be told any more.
			used, err = slices.Clone(a.order), nil
		}
	}
	if err != nil {
		return err
	}
	for _, c := range touched {
		if !slices.Contains(used, c) {
			used = append(used, c)
		}
	}
	return s.orders.save(uffd.Order{Image: m.image.id, ClusterSize: s.faults.ClusterSize(), Clusters: used[:min(len(used), maxAhead)]})
}

// passOn gives what starts of an image, whose parent that is, need to its
// successor, captured from it or of the same content: the older may be removed
// before the younger was ever started.
func (s *Server) passOn(from, parent, to format.ID) {
	if to.IsZero() {
		return
	}
	size := s.faults.ClusterSize()
	clusters, err := s.orders.load(from, parent, size)
	if err == nil && len(clusters) > 0 {
		err = s.orders.save(uffd.Order{Image: to, ClusterSize: size, Clusters: clusters})
	}
	if err != nil {
		s.log.Warn("what starts need is not passed on", "image", to, "err", err)
	}
}

// judge tells what of the read ahead was used, and counts.
func (s *Server) judge(id string, a *ahead, touched []uint32) ([]uint32, error) {
	<-a.done
	if a.err != nil {
		return nil, a.err
	}
	used, err := s.faults.Used(id, a.order)
	if err != nil {
		return nil, err
	}
	in := make(map[uint32]bool, len(a.order))
	for _, c := range a.order {
		in[c] = true
	}
	missed := 0
	for _, c := range touched {
		if !in[c] {
			missed++
		}
	}
	size := uint64(s.faults.ClusterSize())
	r := &pagerv1.Prefetch{
		ReadBytes: uint64(len(a.order)) * size, UsedBytes: uint64(len(used)) * size,
		WastedBytes: uint64(len(a.order)-len(used)) * size, MissedBytes: uint64(missed) * size,
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a.result = r
	s.totals.aheadRead += r.ReadBytes
	s.totals.aheadUsed += r.UsedBytes
	s.totals.aheadWasted += r.WastedBytes
	s.totals.aheadMissed += r.MissedBytes
	return used, nil
}
