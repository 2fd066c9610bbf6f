package hostnet

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

var (
	errForeign = errors.New("slot number is another pool's")
	// errLeftover: the build failed and so did undoing it.
	errLeftover = errors.New("slot could not be undone")
)

// create claims number n and builds its network; on failure nothing is left,
// or the error is errLeftover.
func (p *Pool) create(n int) (*Slot, error) {
	host, inside := p.layout.addrs(n)
	w := &wiring{index: n, host: host, inside: inside, home: p.home, egress: DefaultEgress}
	err := withHostLock(func() (err error) {
		if _, err := p.ownerOf(n); !errors.Is(err, errNoNetns) {
			if err != nil {
				return err
			}
			return errForeign
		}
		if err := removeNetns(n); err != nil { // an empty file, if anything
			return err
		}
		if err := enterHost(false); err != nil {
			return err
		}
		w.ns, err = createNetns(p.home, n, p.owner)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("claim slot %d: %w", n, err)
	}
	if err := w.ensure(); err != nil {
		w.ns.Close()
		err = fmt.Errorf("build slot %d: %w", n, err)
		if undo := destroy(n); undo != nil {
			return nil, fmt.Errorf("%w: %w: %w", errLeftover, err, undo)
		}
		return nil, err
	}
	return p.slot(w), nil
}

func (p *Pool) slot(w *wiring) *Slot {
	return &Slot{Index: w.index, Netns: netnsName(w.index), pool: p, ns: w.ns, egress: w.egress}
}

// destroy takes slot n apart: first the link, so that nothing passes any more,
// then the name. A namespace that something still holds is out of reach then.
func destroy(n int) error {
	return errors.Join(removeHostLink(n), removeNetns(n))
}

// destroyAll is destroy for many. Removing a link waits for an RCU grace
// period, some 25 ms; removing them as a group waits for one together. Held:
// the host lock, for the group.
func destroyAll(slots []int) error {
	if len(slots) == 0 {
		return nil
	}
	if err := removeHostLinks(slots); err != nil {
		return err
	}
	var errs []error
	for _, n := range slots {
		errs = append(errs, removeNetns(n))
	}
	return errors.Join(errs...)
}

// reclaim destroys a released slot in the background.
func (p *Pool) reclaim(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.used, n)
	if p.closed {
		// Close has dealt with it, or is about to: it waits for its turn at mu.
		return
	}
	p.cleaning++
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		p.vacate(n)
		err := destroy(n)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.cleaning--
		p.freed(n, err)
		p.schedule()
	}()
}

// freed books the end of slot n. Held: mu.
func (p *Pool) freed(n int, err error) {
	switch {
	case err != nil:
		p.log.Error("network slot cannot be taken apart", "slot", n, "error", err)
		p.orphans[n] = true
	case n < p.max:
		p.free = append(p.free, n)
	}
}

// Adopt takes over the slot that a sandbox has had since before this process.
// What is missing of it is made again, except what a running VM holds:
// ErrSlotLost when the namespace or the tap is gone.
func (p *Pool) Adopt(ctx context.Context, sandboxID string, index int) (*Slot, error) {
	if !sandboxIDs.MatchString(sandboxID) {
		return nil, fmt.Errorf("sandbox id %q: want 1 to 64 of a-z0-9", sandboxID)
	}
	if index < 0 || index >= p.layout.slots() {
		return nil, fmt.Errorf("slot %d: %v holds slots 0 to %d", index, p.layout.prefix, p.layout.slots()-1)
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if err := p.takeOrphan(index); err != nil {
		return nil, fmt.Errorf("adopt slot %d: %w", index, err)
	}
	s, err := p.repair(index)
	p.mu.Lock()
	delete(p.pending, index)
	if err == nil && p.closed {
		s.detach()
		err = ErrClosed
	}
	if err == nil {
		s.SandboxID = sandboxID
		p.used[index] = s
	} else {
		p.orphans[index] = true
	}
	p.mu.Unlock()
	p.wg.Done()
	if err != nil {
		return nil, fmt.Errorf("adopt slot %d: %w", index, err)
	}
	return s, nil
}

// takeOrphan moves a slot from orphans to pending, and adds to wg.
func (p *Pool) takeOrphan(n int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return ErrClosed
	case p.used[n] != nil || p.pending[n]:
		return errors.New("it is in use")
	case !p.orphans[n]:
		return ErrSlotLost
	}
	delete(p.orphans, n)
	p.pending[n] = true
	p.wg.Add(1)
	return nil
}

func (p *Pool) repair(n int) (*Slot, error) {
	ns, err := openNetns(n)
	if errors.Is(err, errNoNetns) {
		return nil, ErrSlotLost
	}
	if err != nil {
		return nil, err
	}
	host, inside := p.layout.addrs(n)
	w := &wiring{index: n, host: host, inside: inside, home: p.home, ns: ns, adopt: true}
	if err := w.ensure(); err != nil {
		ns.Close()
		return nil, err
	}
	return p.slot(w), nil
}

// Sweep destroys the slots that nobody adopted, but those in keep, which will
// be adopted later; the numbers of the others are used again. Call it when all
// other Adopts are done.
func (p *Pool) Sweep(ctx context.Context, keep ...int) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("sweep network slots: %w", context.Cause(ctx))
	}
	p.mu.Lock()
	var all []int
	if !p.closed {
		for n := range p.orphans {
			if slices.Contains(keep, n) {
				continue
			}
			all = append(all, n)
			p.pending[n] = true
			delete(p.orphans, n)
		}
		p.wg.Add(1)
		defer p.wg.Done()
	}
	p.mu.Unlock()
	err := withHostLock(func() error { return destroyAll(all) })
	p.mu.Lock()
	for _, n := range all {
		delete(p.pending, n)
		p.freed(n, err)
	}
	if p.timer == nil { // which ends the rest after a failed build
		p.resting = false
	}
	p.schedule()
	p.mu.Unlock()
	if err != nil {
		return fmt.Errorf("sweep network slots: %w", err)
	}
	return nil
}

// Close destroys all slots but those in keep, which stay for the next process
// to adopt, and gives up the state directory. The last pool of a host also
// takes the host's table away and sets ip_forward back. Under a cancelled
// context it does as much; the work is bounded.
func (p *Pool) Close(ctx context.Context, keep []int) error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	for _, w := range p.waiters {
		w <- result{err: ErrClosed}
	}
	p.waiters = nil
	if p.timer != nil {
		p.timer.Stop()
	}
	p.mu.Unlock()
	p.wg.Wait()

	p.mu.Lock()
	var gone []int
	for n, s := range p.used {
		s.detach()
		gone = append(gone, n)
	}
	for _, s := range p.ready {
		s.detach()
		gone = append(gone, s.Index)
	}
	for n := range p.orphans {
		gone = append(gone, n)
	}
	p.mu.Unlock()
	gone = slices.DeleteFunc(gone, func(n int) bool { return slices.Contains(keep, n) })
	err := withHostLock(func() error { return errors.Join(destroyAll(gone), leaveHost()) })
	if err = errors.Join(err, p.home.Close(), p.lock.Close()); err != nil {
		return fmt.Errorf("close the network pool: %w", err)
	}
	return nil
}
