package main

import (
	"context"
	"errors"
	"testing"

	rpc "connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/pager"
)

type statusOnly struct {
	pager.Client
	totals *pagerv1.Totals
	err    error
}

func (s statusOnly) GetStatus(context.Context, *rpc.Request[pagerv1.GetStatusRequest]) (*rpc.Response[pagerv1.GetStatusResponse], error) {
	return rpc.NewResponse(&pagerv1.GetStatusResponse{Totals: s.totals, Waits: []*pagerv1.DiskWait{{SandboxId: "a"}, {SandboxId: "b"}}}), s.err
}

func TestPagerFiguresAreScraped(t *testing.T) {
	scrape := func(c prometheus.Collector) map[string]float64 {
		reg := prometheus.NewPedanticRegistry()
		reg.MustRegister(c)
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range families {
			m := f.GetMetric()[0]
			got[f.GetName()] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
		return got
	}
	got := scrape(pagerCollector{statusOnly{totals: &pagerv1.Totals{
		Prefetch: &pagerv1.Prefetch{ReadBytes: 9, UsedBytes: 4, WastedBytes: 5, MissedBytes: 3}, EvictedBytes: 2, SharedResidentBytes: 1,
		Faults: 6, FilledBytes: 7, DiskWaits: 8,
	}}})
	for name, want := range map[string]float64{
		"wrenn_pager_prefetch_read_bytes_total": 9, "wrenn_pager_prefetch_used_bytes_total": 4,
		"wrenn_pager_prefetch_wasted_bytes_total": 5, "wrenn_pager_prefetch_missed_bytes_total": 3,
		"wrenn_pager_evicted_bytes_total": 2, "wrenn_pager_shared_resident_bytes": 1,
		"wrenn_pager_faults_total": 6, "wrenn_pager_filled_bytes_total": 7,
		"wrenn_pager_disk_waits_total": 8, "wrenn_sandboxes_waiting_for_disk": 2,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
	if got := scrape(pagerCollector{statusOnly{err: errors.New("away")}}); len(got) != 0 {
		t.Errorf("figures of a pager that is away: %v", got)
	}
}
