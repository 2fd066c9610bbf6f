package main

import (
	"context"
	"math"
	"strings"
	"testing"

	rpc "connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	agentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
)

func TestRoomOnTheDisk(t *testing.T) {
	if err := checkRoom(t.TempDir(), 1); err != nil {
		t.Errorf("with room: %v", err)
	}
	if err := checkRoom(t.TempDir(), math.MaxUint64); err == nil || !strings.Contains(err.Error(), "MiB free") {
		t.Errorf("below the mark: %v", err)
	}
	if err := checkRoom("/does/not/exist", 1); err == nil {
		t.Error("a directory that is not there has room")
	}
}

// gather scrapes one collector: figures by name and labels.
func gather(t *testing.T, reg prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			// Of a histogram, how many observations it has.
			got[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return got
}

type levels hostnet.Levels

func (l levels) Levels() hostnet.Levels { return hostnet.Levels(l) }

func TestHostFiguresAreScraped(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(hostCollector{levels{Ready: 1, Used: 2, Building: 3, Cleaning: 4, Waiting: 5}, t.TempDir(), 6})
	got := gather(t, reg)
	for name, want := range map[string]float64{
		"wrenn_network_slots ready": 1, "wrenn_network_slots used": 2, "wrenn_network_slots building": 3,
		"wrenn_network_slots cleaning": 4, "wrenn_network_slot_waiters": 5, "wrenn_disk_low_water_bytes": 6,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
	if got["wrenn_disk_free_bytes"] <= 0 {
		t.Errorf("no room: %v", got)
	}
}

func TestOperationsTellTheirBytesAndParts(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	next := func(context.Context, rpc.AnyRequest) (rpc.AnyResponse, error) {
		return rpc.NewResponse(&agentv1.PauseSandboxResponse{Stats: &agentv1.OpStats{
			MemoryBytes: 10, DiskBytes: 20, StateBytes: 30, PhasesUs: map[string]int64{"commit": 1500},
		}}), nil
	}
	req := specced{rpc.NewRequest(&agentv1.PauseSandboxRequest{})}
	if _, err := newOperationFigures(reg).intercept(next)(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	got := gather(t, reg)
	for name, want := range map[string]float64{
		"wrenn_host_written_bytes_total PauseSandbox memory": 10, "wrenn_host_written_bytes_total PauseSandbox disk": 20,
		"wrenn_host_written_bytes_total PauseSandbox state": 30, "wrenn_host_phase_duration_seconds PauseSandbox commit": 1,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v; all: %v", name, got[name], want, got)
		}
	}
}

// specced is a request that names its procedure, as a client's does.
type specced struct {
	*rpc.Request[agentv1.PauseSandboxRequest]
}

func (specced) Spec() rpc.Spec {
	return rpc.Spec{Procedure: hostagentv1connect.HostAgentServicePauseSandboxProcedure}
}
