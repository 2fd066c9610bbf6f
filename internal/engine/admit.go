package engine

import (
	"fmt"

	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

// admit refuses a sandbox that is to be started where the host has no room for
// it, naming what is short and what helps. One that is admitted counts from
// now on, until admitted is called. image is the memory that it would share with
// its clones by having it whole in RAM, or zero: it may, where there is room for
// that too. e.mu is held.
func (e *Engine) admit(sb *sandbox, image format.ID) error {
	want := sb.info()
	memory, vcpus := 0, 0
	wholes := map[format.ID]int{} // MiB
	for _, other := range e.sandboxes {
		if i := other.info(); other != sb && (e.starting[other] || other.holds()) {
			memory += i.MemoryMB
			vcpus += i.VCPUs
			if !other.whole.IsZero() {
				wholes[other.whole] = i.MemoryMB
			}
		}
	}
	for _, mb := range wholes {
		memory += mb
	}
	if limit := e.opts.MemoryLimitMB; limit > 0 && memory+want.MemoryMB > limit {
		return fmt.Errorf("%w in the host's memory: the sandbox wants %d MiB, and %d of %d MiB are taken; pause or remove some sandboxes, or raise --memory-limit",
			ErrNoRoom, want.MemoryMB, memory, limit)
	}
	if limit := e.opts.VCPULimit; limit > 0 && vcpus+want.VCPUs > limit {
		return fmt.Errorf("%w on the host's CPUs: the sandbox wants %d virtual CPUs, and %d of %d are taken; pause or remove some sandboxes, or raise --vcpu-limit",
			ErrNoRoom, want.VCPUs, vcpus, limit)
	}
	if err := e.diskFor("a running sandbox"); err != nil {
		return err
	}
	e.starting[sb] = true
	sb.whole = format.ID{}
	if _, there := wholes[image]; there || e.opts.MemoryLimitMB <= 0 || memory+2*want.MemoryMB <= e.opts.MemoryLimitMB {
		sb.whole = image
	}
	return nil
}

// mayHaveWhole tells whether a sandbox was admitted with its image whole in RAM.
func (e *Engine) mayHaveWhole(sb *sandbox) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !sb.whole.IsZero()
}

// hasNoWhole ends what admit allowed and the pager did not.
func (e *Engine) hasNoWhole(sb *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	sb.whole = format.ID{}
}

// admitted ends what admit began: the state tells from now on.
func (e *Engine) admitted(sb *sandbox) {
	e.mu.Lock()
	delete(e.starting, sb)
	e.mu.Unlock()
}

// holds tells whether a sandbox has a VM, or may have one.
func (sb *sandbox) holds() bool {
	j := sb.journal()
	return j.Run != nil || j.State != Paused && j.State != Failed
}

// diskFor refuses new work below the low-water mark. A host that cannot tell
// its free space is not below it.
func (e *Engine) diskFor(what string) error {
	if e.opts.MinFreeDisk <= 0 {
		return nil
	}
	free, err := e.opts.DiskFree()
	if err != nil {
		e.log.Error("cannot tell how much disk is free", "err", err)
		return nil
	}
	if free < e.opts.MinFreeDisk {
		return fmt.Errorf("%w on the host's disk for %s: %d MiB are free, and below %d MiB nothing new is begun; remove snapshots or paused sandboxes, or lower --min-free-disk",
			ErrNoRoom, what, free>>20, e.opts.MinFreeDisk>>20)
	}
	return nil
}
