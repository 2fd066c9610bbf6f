package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1/pagerv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/vmm/firecracker/fctest"
)

// shortOfRoom is a pager that says that writes wait for room: from the question
// with that number on, 0 being never.
type shortOfRoom struct {
	pagerv1connect.PagerServiceClient
	from, asked atomic.Int32
}

func (p *shortOfRoom) YieldDisk(_ context.Context, _ *connect.Request[pagerv1.YieldDiskRequest]) (*connect.Response[pagerv1.YieldDiskResponse], error) {
	from, n := p.from.Load(), p.asked.Add(1)
	return connect.NewResponse(&pagerv1.YieldDiskResponse{Waiting: from != 0 && n >= from}), nil
}

func newRigShortOfRoom(t *testing.T) (*ownRig, *shortOfRoom) {
	r := newOwnRig(t, time.Minute)
	p := &shortOfRoom{PagerServiceClient: r.opts.Pager}
	r.opts.Pager, r.opts.RetryAfter = p, 10*time.Millisecond
	r.must(r.create("a"))
	r.restart()
	return r, p
}

// count tells how often the program was asked for something.
func (r *ownRig) count(call string) (n int) {
	for _, c := range r.program.Calls(r.t) {
		if strings.HasPrefix(c, call) {
			n++
		}
	}
	return n
}

// isHeld tells whether a VM is still to be let go on.
func (r *ownRig) isHeld(id string) bool {
	sb, err := r.find(id)
	r.must(err)
	sb.op <- struct{}{}
	defer sb.end()
	return sb.current().held
}

// TestAVMMWhoseWritesWaitIsNotStopped: it would not answer.
func TestAVMMWhoseWritesWaitIsNotStopped(t *testing.T) {
	r, p := newRigShortOfRoom(t)
	before := r.program.Calls(t)
	p.from.Store(1)
	if err := r.pause("a"); !errors.Is(err, ErrNoRoom) || !strings.Contains(err.Error(), "free some space") {
		t.Errorf("a pause: %v", err)
	}
	if now := r.program.Calls(t); !slices.Equal(now, before) {
		t.Errorf("it was asked %v", now[len(before):])
	}
	if s := r.state("a"); s != Running {
		t.Errorf("it is %s, want running", s)
	}
	p.from.Store(0)
	r.must(r.pause("a"))
}

// TestAVMMWhoseWritesBeginToWaitIsGivenUpAndGoesOn: it answers nothing until
// there is room, so the pause fails at once, and the VM is let go on later.
func TestAVMMWhoseWritesBeginToWaitIsGivenUpAndGoesOn(t *testing.T) {
	for _, call := range []string{"PATCH /vm", "PUT /snapshot/create"} {
		t.Run(strings.ReplaceAll(call, "/", "_"), func(t *testing.T) {
			const goOn = `PATCH /vm {"state":"Resumed"}`
			r, p := newRigShortOfRoom(t)
			told := r.count(goOn)
			r.program.Fail(t, call, fctest.Hang)
			p.from.Store(p.asked.Load() + 2) // not before it is stopped
			if err := r.pause("a"); !errors.Is(err, ErrNoRoom) || !strings.Contains(err.Error(), "free some space") {
				t.Errorf("a pause: %v", err)
			}
			if s := r.state("a"); s != Running {
				t.Errorf("it is %s, want running", s)
			}
			if n := r.count(goOn); n != told {
				t.Errorf("it was told to go on before there was room: %v", r.program.Calls(t))
			}
			if err := r.pause("a"); !errors.Is(err, ErrNoRoom) && !errors.Is(err, ErrState) {
				t.Errorf("a second pause: %v", err)
			}
			p.from.Store(0)
			for r.isHeld("a") {
				time.Sleep(5 * time.Millisecond) // until the engine looks again
			}
			if n := r.count(goOn); call == "PUT /snapshot/create" && n == told {
				t.Errorf("it was never told to go on: %v", r.program.Calls(t))
			}
			r.must(r.pause("a"))
			r.savedWhole()
			r.nothingHeld("paused", 1)
		})
	}
}

// TestAVMMWhoseWritesWaitCanBeRemoved also when a pause has stopped it.
func TestAVMMWhoseWritesWaitCanBeRemoved(t *testing.T) {
	r, p := newRigShortOfRoom(t)
	r.program.Fail(t, "PUT /snapshot/create", fctest.Hang)
	p.from.Store(p.asked.Load() + 2)
	if err := r.pause("a"); !errors.Is(err, ErrNoRoom) {
		t.Errorf("a pause: %v", err)
	}
	r.must(r.Destroy(t.Context(), "a"))
	r.nothingHeld("at the end", 0)
}
