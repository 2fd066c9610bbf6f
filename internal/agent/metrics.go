package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
)

// guestMetrics is what the guest agent tells of itself.
type guestMetrics struct {
	TimestampUnix int64   `json:"ts"`
	CPUCount      uint32  `json:"cpu_count"`
	CPUUsedPct    float64 `json:"cpu_used_pct"`
	MemTotal      uint64  `json:"mem_total"`
	MemUsed       uint64  `json:"mem_used"`
	MemCache      uint64  `json:"mem_cache"`
	DiskTotal     uint64  `json:"disk_total"`
	DiskUsed      uint64  `json:"disk_used"`
}

// GetSandboxMetrics implements hostagent.v1.
func (a *Agent) GetSandboxMetrics(ctx context.Context, req *connect.Request[agentv1.GetSandboxMetricsRequest]) (*connect.Response[agentv1.GetSandboxMetricsResponse], error) {
	g, err := a.engine.Guest(req.Msg.SandboxId)
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	usage, err := a.engine.Usage(ctx, req.Msg.SandboxId)
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	resp, err := g.HTTP(ctx, http.MethodGet, "/metrics", nil)
	if err != nil {
		return nil, a.wire(ctx, fmt.Errorf("read the guest's metrics: %w", err))
	}
	defer resp.Body.Close()
	if err := httpError(resp); err != nil {
		return nil, a.wire(ctx, err)
	}
	var m guestMetrics
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&m); err != nil {
		return nil, a.wire(ctx, fmt.Errorf("decode the guest's metrics: %w", err))
	}
	return connect.NewResponse(&agentv1.GetSandboxMetricsResponse{
		At: timestamppb.New(usage.At), CpuCount: m.CPUCount, CpuUsedPct: m.CPUUsedPct,
		MemTotal: m.MemTotal, MemUsed: m.MemUsed, MemCache: m.MemCache, DiskTotal: m.DiskTotal, DiskUsed: m.DiskUsed,
		PrivateMemoryBytes: uint64(usage.PrivateMemory), Faults: usage.Faults,
	}), nil
}
