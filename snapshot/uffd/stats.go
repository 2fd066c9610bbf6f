//go:build linux

package uffd

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// timeBuckets is the length of Stats.ServiceTime.
const timeBuckets = 24

// Stats count what a Server did for one attachment since it was added.
type Stats struct {
	Faults      uint64 `json:"faults"`       // events read
	DataFaults  uint64 `json:"data_faults"`  // that had to read the image
	Hits        uint64 `json:"hits"`         // whose page was there when they were served
	ZeroFaults  uint64 `json:"zero_faults"`  // in runs of zeros
	BytesFilled uint64 `json:"bytes_filled"` // put into the shared image, or the VM in copy mode
	Removed     uint64 `json:"removed"`      // bytes that the VM gave back, in copy mode
	Retries     uint64 `json:"retries"`      // of faults while the VM's memory changed
	// ServiceTime counts faults by the time from leaving the queue to the wake:
	// element i those below 2^i microseconds and not below 2^(i-1); the last
	// one also all longer ones.
	ServiceTime [timeBuckets]uint64 `json:"service_time_log2_us"`
}

func (s *Stats) add(o Stats) {
	s.Faults += o.Faults
	s.DataFaults += o.DataFaults
	s.Hits += o.Hits
	s.ZeroFaults += o.ZeroFaults
	s.BytesFilled += o.BytesFilled
	s.Removed += o.Removed
	s.Retries += o.Retries
	for i, n := range o.ServiceTime {
		s.ServiceTime[i] += n
	}
}

type counters struct {
	faults, dataFaults, hits, zeroFaults, bytesFilled, retries atomic.Uint64
	serviceTime                                                [timeBuckets]atomic.Uint64
}

func (c *counters) observe(d time.Duration) {
	c.serviceTime[min(bits.Len64(uint64(d.Microseconds())), timeBuckets-1)].Add(1)
}

func (c *counters) snapshot() Stats {
	s := Stats{
		Faults: c.faults.Load(), DataFaults: c.dataFaults.Load(), Hits: c.hits.Load(),
		ZeroFaults: c.zeroFaults.Load(), BytesFilled: c.bytesFilled.Load(), Retries: c.retries.Load(),
	}
	for i := range s.ServiceTime {
		s.ServiceTime[i] = c.serviceTime[i].Load()
	}
	return s
}
