package engine

import (
	"context"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/snapshot/uffd"
)

// Usage is what a running sandbox costs the host.
type Usage struct {
	At time.Time
	// PrivateMemory is the guest memory that it alone owns, bytes: after a
	// boot all that it touched, after a restore the pages it wrote.
	PrivateMemory int64
	// Faults served for it, and bytes read from the store because of them.
	Faults, BytesFilled uint64
	// SharedResident is the RAM of the image that it shares with its
	// siblings, bytes.
	SharedResident int64
}

// Usage measures a running sandbox.
func (e *Engine) Usage(ctx context.Context, id string) (Usage, error) {
	sb, err := e.find(id)
	if err != nil {
		return Usage{}, err
	}
	r, j := sb.current(), sb.journal()
	if r == nil || j.Run == nil {
		return Usage{}, fmt.Errorf("%w: sandbox %s is %s, not running", ErrState, id, j.State)
	}
	u := Usage{At: e.opts.Now()}
	count := func(_, n int64) error { u.PrivateMemory += n; return nil }
	size := int64(j.MemoryMB) << 20
	switch {
	case e.ownMemory():
		n, err := ownMemoryOf(r.machine.PID())
		if err != nil {
			return u, err
		}
		u.PrivateMemory = min(n, size)
		if j.Run.MemoryImage.IsZero() { // booted: nobody serves it
			return u, nil
		}
	case j.Run.RAMAddr == 0:
		f, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", r.machine.PID(), r.machine.MemoryFD()))
		if err != nil {
			return u, fmt.Errorf("open the guest's memory: %w", err)
		}
		defer f.Close()
		return u, scanFile(f, size, count)
	default:
		if err := uffd.ScanDirty(r.machine.PID(), uintptr(j.Run.RAMAddr), size, count); err != nil {
			return u, fmt.Errorf("count private pages: %w", err)
		}
	}
	st, err := e.opts.Pager.GetStats(ctx, connect.NewRequest(&pagerv1.GetStatsRequest{SandboxId: id}))
	if err != nil {
		return u, fmt.Errorf("ask the pager: %w", err)
	}
	u.Faults, u.BytesFilled, u.SharedResident = st.Msg.Faults, st.Msg.BytesFilled, st.Msg.SharedResidentBytes
	return u, nil
}
