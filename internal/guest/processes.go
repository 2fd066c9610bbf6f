package guest

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/internal/gen/process"
)

const (
	// maxProcesses bounds the processes that calls started and that run.
	maxProcesses = 2048
	// maxEnded bounds the ended processes whose end no client has seen; the
	// oldest are forgotten.
	maxEnded = 32
)

// processes are those that calls started: the running ones, and the last few
// that ended while no client was attached, so that a client that was cut off
// still learns how its command ended.
type processes struct {
	mu      sync.Mutex
	running map[int]*proc
	ended   []*proc // oldest first
	// starting counts those between the check of the bound and running.
	starting int
}

func newProcesses() *processes { return &processes{running: map[int]*proc{}} }

// start spawns a command with its first client attached.
func (ps *processes) start(c *command, o startOptions) (*proc, *reader, error) {
	ps.mu.Lock()
	if len(ps.running)+ps.starting >= maxProcesses {
		ps.mu.Unlock()
		return nil, nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("%d processes run already", maxProcesses))
	}
	ps.starting++
	ps.mu.Unlock()

	p, r, err := spawn(c, o, ps.retire)

	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.starting--
	if err != nil {
		return nil, nil, err
	}
	if !p.registered { // retire may have been faster
		p.registered = true
		ps.running[p.pid] = p
	}
	return p, r, nil
}

// retire moves a process that is over to the ended ones.
func (ps *processes) retire(p *proc) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p.registered = true
	if ps.running[p.pid] == p {
		delete(ps.running, p.pid)
	}
	ps.ended = append(ps.ended, p)
	if len(ps.ended) > maxEnded {
		ps.ended = slices.Delete(ps.ended, 0, 1)
	}
}

// forget drops an ended process whose end a client has.
func (ps *processes) forget(p *proc) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if i := slices.Index(ps.ended, p); i >= 0 {
		ps.ended = slices.Delete(ps.ended, i, i+1)
	}
}

func (ps *processes) list() []*proc {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	out := make([]*proc, 0, len(ps.running))
	for _, p := range ps.running {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *proc) int { return cmp.Compare(a.pid, b.pid) })
	return out
}

// find returns the process that a selector names. withEnded also finds one
// that is over but whose end nobody has seen.
func (ps *processes) find(sel *pb.ProcessSelector, withEnded bool) (*proc, error) {
	var match func(*proc) bool
	var who string
	switch x := sel.GetSelector().(type) {
	case *pb.ProcessSelector_Pid:
		match = func(p *proc) bool { return p.pid == int(x.Pid) }
		who = fmt.Sprintf("pid %d", x.Pid)
	case *pb.ProcessSelector_Tag:
		if err := checkTag(x.Tag); err != nil {
			return nil, err
		}
		match = func(p *proc) bool { return p.tag != nil && *p.tag == x.Tag }
		who = fmt.Sprintf("tag '%s'", x.Tag)
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("process: select it by pid or tag"))
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	var found *proc
	for _, p := range ps.running {
		// Of several with one tag it is the newest that is meant.
		if match(p) && (found == nil || p.started.After(found.started)) {
			found = p
		}
	}
	if found == nil && withEnded {
		for _, p := range slices.Backward(ps.ended) {
			if match(p) {
				found = p
				break
			}
		}
	}
	if found == nil {
		return nil, errNoProcess(who)
	}
	return found, nil
}
