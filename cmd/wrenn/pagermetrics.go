package main

import (
	"context"
	"time"

	rpc "connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	pagerv1 "git.omukk.dev/wrenn/sandbox/internal/gen/pager/v1"
	"git.omukk.dev/wrenn/sandbox/internal/pager"
)

// pagerCollector asks the pager for its totals whenever it is scraped. They
// begin at 0 with each pager, as counters may.
type pagerCollector struct{ client pager.Client }

// pagerScrapeLimit bounds a scrape while the pager is being replaced.
const pagerScrapeLimit = 2 * time.Second

var pagerFigures = []struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	get  func(*pagerv1.Totals) float64
}{
	{prometheus.NewDesc("wrenn_pager_prefetch_read_bytes_total", "Bytes of memory images read ahead of cold starts, of those that can be judged.", nil, nil), prometheus.CounterValue,
		func(t *pagerv1.Totals) float64 { return float64(t.GetPrefetch().GetReadBytes()) }},
	{prometheus.NewDesc("wrenn_pager_prefetch_used_bytes_total", "Of the bytes read ahead, those that the start used; precision is used/read.", nil, nil), prometheus.CounterValue,
		func(t *pagerv1.Totals) float64 { return float64(t.GetPrefetch().GetUsedBytes()) }},
	{prometheus.NewDesc("wrenn_pager_prefetch_wasted_bytes_total", "Of the bytes read ahead, those that the start did not use.", nil, nil), prometheus.CounterValue,
		func(t *pagerv1.Totals) float64 { return float64(t.GetPrefetch().GetWastedBytes()) }},
	{prometheus.NewDesc("wrenn_pager_prefetch_missed_bytes_total", "Bytes that starts needed and that were not read ahead; recall is used/(used+missed).", nil, nil), prometheus.CounterValue,
		func(t *pagerv1.Totals) float64 { return float64(t.GetPrefetch().GetMissedBytes()) }},
	{prometheus.NewDesc("wrenn_pager_evicted_bytes_total", "Bytes of memory images given back when memory was short.", nil, nil), prometheus.CounterValue,
		func(t *pagerv1.Totals) float64 { return float64(t.GetEvictedBytes()) }},
	{prometheus.NewDesc("wrenn_pager_faults_total", "Page faults of guests served.", nil, nil), prometheus.CounterValue,
		func(t *pagerv1.Totals) float64 { return float64(t.GetFaults()) }},
	{prometheus.NewDesc("wrenn_pager_filled_bytes_total", "Bytes put into shared memory images and guests because of faults.", nil, nil), prometheus.CounterValue,
		func(t *pagerv1.Totals) float64 { return float64(t.GetFilledBytes()) }},
	{prometheus.NewDesc("wrenn_pager_disk_waits_total", "How often writes of a sandbox began to wait for room on the host's disk.", nil, nil), prometheus.CounterValue,
		func(t *pagerv1.Totals) float64 { return float64(t.GetDiskWaits()) }},
	{prometheus.NewDesc("wrenn_pager_shared_resident_bytes", "RAM of all shared memory images.", nil, nil), prometheus.GaugeValue,
		func(t *pagerv1.Totals) float64 { return float64(t.GetSharedResidentBytes()) }},
}

// waitingDisksDesc counts who waits; the totals count how often.
var waitingDisksDesc = prometheus.NewDesc("wrenn_sandboxes_waiting_for_disk", "Sandboxes that stand still because their writes find no room on the host's disk.", nil, nil)

// Describe implements prometheus.Collector.
func (c pagerCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- waitingDisksDesc
	for _, f := range pagerFigures {
		ch <- f.desc
	}
}

// Collect implements prometheus.Collector. A pager that does not answer costs
// its own figures, not the scrape: it is being started again.
func (c pagerCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), pagerScrapeLimit)
	defer cancel()
	r, err := c.client.GetStatus(ctx, rpc.NewRequest(&pagerv1.GetStatusRequest{}))
	if err != nil {
		return
	}
	ch <- prometheus.MustNewConstMetric(waitingDisksDesc, prometheus.GaugeValue, float64(len(r.Msg.Waits)))
	for _, f := range pagerFigures {
		ch <- prometheus.MustNewConstMetric(f.desc, f.kind, f.get(r.Msg.Totals))
	}
}
