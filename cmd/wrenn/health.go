package main

import (
	"context"
	"fmt"

	rpc "connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
	"git.omukk.dev/wrenn/sandbox/snapshot/storage"
)

// checks are what /readyz asks of this host besides the control plane's own.
// Below low bytes of room in dir no new work is taken.
func (s *stack) checks(dir string, low int64) []control.Check {
	return []control.Check{
		{Name: "pager", Do: s.checkPager},
		{Name: "disk", Do: func(context.Context) error { return checkRoom(dir, uint64(low)) }},
	}
}

func (s *stack) checkPager(ctx context.Context) error {
	if _, err := s.keeper.Client().GetStatus(ctx, rpc.NewRequest(&pagerv1.GetStatusRequest{})); err != nil {
		return &control.Error{Code: control.CodeHostUnavailable, Message: "the pager does not answer", Err: err}
	}
	return nil
}

func checkRoom(dir string, low uint64) error {
	free, err := storage.FreeBelow(dir)
	if err != nil {
		return &control.Error{Code: control.CodeHostUnavailable, Message: "the state directory's file system does not answer", Err: err}
	}
	if uint64(free) < low {
		return &control.Error{Code: control.CodeHostUnavailable, Message: fmt.Sprintf(
			"the state directory's file system has %d MiB free, less than %d; below that nothing new is begun: delete sandboxes or snapshots, or lower --min-free-disk", free>>20, low>>20)}
	}
	return nil
}

// hostCollector counts what this host has ready, whenever it is scraped.
type hostCollector struct {
	pool interface{ Levels() hostnet.Levels }
	dir  string
	low  int64 // bytes below which no new work is taken
}

var (
	slotsDesc   = prometheus.NewDesc("wrenn_network_slots", "Network slots by what they are doing; ready ones wait for sandboxes.", []string{"state"}, nil)
	waitingDesc = prometheus.NewDesc("wrenn_network_slot_waiters", "Sandboxes that wait for a network slot.", nil, nil)
	freeDesc    = prometheus.NewDesc("wrenn_disk_free_bytes", "Room in the state directory's file system.", nil, nil)
	lowDesc     = prometheus.NewDesc("wrenn_disk_low_water_bytes", "The room below which no new work is taken; 0 is no bound.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c hostCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{slotsDesc, waitingDesc, freeDesc, lowDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c hostCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	l := c.pool.Levels()
	gauge(slotsDesc, float64(l.Ready), "ready")
	gauge(slotsDesc, float64(l.Used), "used")
	gauge(slotsDesc, float64(l.Building), "building")
	gauge(slotsDesc, float64(l.Cleaning), "cleaning")
	gauge(waitingDesc, float64(l.Waiting))
	gauge(lowDesc, float64(c.low))
	if free, err := storage.FreeBelow(c.dir); err == nil { // /readyz tells the error
		gauge(freeDesc, float64(free))
	}
}
