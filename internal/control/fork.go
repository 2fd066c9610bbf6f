package control

import (
	"context"
	"fmt"
	"strings"
	"sync"
)

// forksAtOnce bounds how many children start at the same time.
const forksAtOnce = 4

// forkPrefix begins the names of snapshots that live as long as a fork takes.
const forkPrefix = "fork-"

// isForkName tells the name of a fork's snapshot from those that people give.
func isForkName(name string) bool {
	id, ok := strings.CutPrefix(name, forkPrefix)
	return ok && len(id) == idLength && ValidateID("id", id) == nil
}

// Child is one result of Fork: a sandbox, or why there is none.
type Child struct {
	Sandbox Sandbox
	Err     error
}

// Fork makes count sandboxes that go on from the present state of a running or
// paused one, which stays as it is. It is a snapshot under a name of its own,
// creates from it, and the removal of the name. Each child takes the template,
// metadata, time limit and auto_pause of the source. An error of Fork itself
// means that there are no children.
func (s *Service) Fork(ctx context.Context, id string, count int64) (_ []Child, err error) {
	if err := ValidateID("id", id); err != nil {
		return nil, err
	}
	if err := inRange("count", count, 1, MaxForks, ""); err != nil {
		return nil, err
	}
	ctx, cancel := s.detach(ctx)
	defer cancel()
	defer s.observe("fork")(&err)
	src, release, err := s.hold(ctx, id, "fork")
	if err != nil {
		return nil, err
	}
	defer s.noted(ctx, id, EventFork, fmt.Sprintf("%d children", count))(&err)
	name := forkPrefix + newID()
	// The name's lock keeps reconciling from listing it meanwhile.
	releaseName, err := s.names.take(ctx, name)
	if err != nil {
		release()
		return nil, err
	}
	defer releaseName()
	s.snapshots.Add(1)
	_, err = s.host.CreateSnapshot(ctx, id, name, false)
	release()
	if err != nil {
		s.wake()
		return nil, err
	}
	defer func() {
		if err := s.host.DeleteSnapshot(ctx, name); err != nil {
			// Reconciling then lists it, and it can be deleted like any other.
			s.log.WarnContext(ctx, "remove the snapshot of a fork", "name", name, "err", err)
		}
	}()
	children := s.spawn(ctx, src, name, int(count))
	for _, c := range children {
		if c.Err == nil {
			return children, nil
		}
	}
	return nil, children[0].Err
}

func (s *Service) spawn(ctx context.Context, src Sandbox, name string, count int) []Child {
	children := make([]Child, count)
	var wg sync.WaitGroup
	slots := make(chan struct{}, forksAtOnce)
	for i := range children {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			sb := Sandbox{
				ID: newID(), Template: src.Template, Status: StatusPending,
				VCPUs: src.VCPUs, MemoryMB: src.MemoryMB, Metadata: src.Metadata,
				TimeoutSec: src.TimeoutSec, AutoPause: src.AutoPause,
				Options: forkedOptions(src.Options), Version: 1,
			}
			children[i].Sandbox, children[i].Err = s.create(ctx, sb, name, nil)
		})
	}
	wg.Wait()
	return children
}
