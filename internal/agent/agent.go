// Package agent serves hostagent.v1 for one host: it translates calls to the
// engine and to the guest agents, and decides nothing itself. cmd/wrenn may
// import it.
package agent

import (
	"context"
	"errors"
	"log/slog"
	"runtime"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"git.omukk.dev/wrenn/sandbox/internal/engine"
	agentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1/hostagentv1connect"
	"git.omukk.dev/wrenn/sandbox/snapshot"
)

// Agent implements hostagent.v1.
type Agent struct {
	engine  *engine.Engine
	version string
	log     *slog.Logger
}

var _ hostagentv1connect.HostAgentServiceHandler = (*Agent)(nil)

// New makes an agent on an engine.
func New(e *engine.Engine, version string, log *slog.Logger) *Agent {
	return &Agent{engine: e, version: version, log: log}
}

// wire gives an engine's error its code. What the user may not see is logged
// here and goes out as internal.
func (a *Agent) wire(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	var known *connect.Error
	switch {
	case errors.Is(err, engine.ErrInvalid):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, engine.ErrNotFound):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, engine.ErrExists):
		return connect.NewError(connect.CodeAlreadyExists, err)
	case errors.Is(err, engine.ErrState):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	case errors.Is(err, engine.ErrNoRoom):
		return connect.NewError(connect.CodeResourceExhausted, err)
	case errors.Is(err, unix.ENOSPC):
		a.log.ErrorContext(ctx, "the disk is full", "err", err)
		return connect.NewError(connect.CodeResourceExhausted, errors.New("the host's disk is full; nothing was lost: free some space and try again"))
	case errors.As(err, &known) && known.Code() == connect.CodeOutOfRange:
		return known
	case errors.As(err, &known) && known.Code() == connect.CodeCanceled, errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	}
	a.log.ErrorContext(ctx, "an operation failed", "err", err)
	return connect.NewError(connect.CodeInternal, err)
}

// GetHost implements hostagent.v1.
func (a *Agent) GetHost(context.Context, *connect.Request[agentv1.GetHostRequest]) (*connect.Response[agentv1.GetHostResponse], error) {
	d := a.engine.Driver()
	out := &agentv1.GetHostResponse{
		Driver: d.Kind, DriverVersion: d.Version, Accelerator: d.Accel,
		Cpus: uint32(runtime.NumCPU()), Version: a.version,
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err == nil {
		out.MemoryTotalMb = si.Totalram * uint64(si.Unit) >> 20
		out.MemoryFreeMb = si.Freeram * uint64(si.Unit) >> 20
	}
	return connect.NewResponse(out), nil
}

// CreateSandbox implements hostagent.v1.
func (a *Agent) CreateSandbox(ctx context.Context, req *connect.Request[agentv1.CreateSandboxRequest]) (*connect.Response[agentv1.CreateSandboxResponse], error) {
	m := req.Msg
	info, st, err := a.engine.Create(ctx, engine.CreateSpec{
		ID: m.Id, Template: m.Template, VCPUs: int(m.Vcpus), MemoryMB: int(m.MemoryMb),
		Envs: m.Envs, Annotations: m.Annotations, Egress: egressOf(m.Egress),
	})
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	return connect.NewResponse(&agentv1.CreateSandboxResponse{Sandbox: sandboxOf(info), Stats: statsOf(st)}), nil
}

// DestroySandbox implements hostagent.v1.
func (a *Agent) DestroySandbox(ctx context.Context, req *connect.Request[agentv1.DestroySandboxRequest]) (*connect.Response[agentv1.DestroySandboxResponse], error) {
	if err := a.engine.Destroy(ctx, req.Msg.Id); err != nil {
		return nil, a.wire(ctx, err)
	}
	return connect.NewResponse(&agentv1.DestroySandboxResponse{}), nil
}

// PauseSandbox implements hostagent.v1.
func (a *Agent) PauseSandbox(ctx context.Context, req *connect.Request[agentv1.PauseSandboxRequest]) (*connect.Response[agentv1.PauseSandboxResponse], error) {
	info, st, err := a.engine.Pause(ctx, req.Msg.Id)
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	return connect.NewResponse(&agentv1.PauseSandboxResponse{Sandbox: sandboxOf(info), Stats: statsOf(st)}), nil
}

// ResumeSandbox implements hostagent.v1.
func (a *Agent) ResumeSandbox(ctx context.Context, req *connect.Request[agentv1.ResumeSandboxRequest]) (*connect.Response[agentv1.ResumeSandboxResponse], error) {
	info, st, err := a.engine.Resume(ctx, req.Msg.Id, req.Msg.Reboot)
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	return connect.NewResponse(&agentv1.ResumeSandboxResponse{Sandbox: sandboxOf(info), Stats: statsOf(st)}), nil
}

// ListSandboxes implements hostagent.v1.
func (a *Agent) ListSandboxes(context.Context, *connect.Request[agentv1.ListSandboxesRequest]) (*connect.Response[agentv1.ListSandboxesResponse], error) {
	out := &agentv1.ListSandboxesResponse{}
	for _, i := range a.engine.List() {
		out.Sandboxes = append(out.Sandboxes, sandboxOf(i))
	}
	return connect.NewResponse(out), nil
}

// WatchSandboxes implements hostagent.v1.
func (a *Agent) WatchSandboxes(ctx context.Context, _ *connect.Request[agentv1.WatchSandboxesRequest], stream *connect.ServerStream[agentv1.WatchSandboxesResponse]) error {
	now, events := a.engine.Watch(ctx)
	for _, i := range now {
		if err := stream.Send(&agentv1.WatchSandboxesResponse{Sandbox: sandboxOf(i)}); err != nil {
			return err
		}
	}
	if err := stream.Send(&agentv1.WatchSandboxesResponse{Synced: true}); err != nil {
		return err
	}
	for ev := range events {
		if err := stream.Send(&agentv1.WatchSandboxesResponse{Sandbox: sandboxOf(ev.Sandbox), Removed: ev.Removed}); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return connect.NewError(connect.CodeUnavailable, errors.New("the watcher fell behind; watch again"))
}

// CreateSnapshot implements hostagent.v1.
func (a *Agent) CreateSnapshot(ctx context.Context, req *connect.Request[agentv1.CreateSnapshotRequest]) (*connect.Response[agentv1.CreateSnapshotResponse], error) {
	m, st, err := a.engine.SnapshotAs(ctx, engine.SnapshotSpec{
		Sandbox: req.Msg.SandboxId, Name: req.Msg.Name, Replace: req.Msg.Replace,
	})
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	return connect.NewResponse(&agentv1.CreateSnapshotResponse{Snapshot: snapshotOf(m), Stats: statsOf(st)}), nil
}

// DeleteSnapshot implements hostagent.v1.
func (a *Agent) DeleteSnapshot(ctx context.Context, req *connect.Request[agentv1.DeleteSnapshotRequest]) (*connect.Response[agentv1.DeleteSnapshotResponse], error) {
	if err := a.engine.DeleteSnapshot(ctx, req.Msg.Name); err != nil {
		return nil, a.wire(ctx, err)
	}
	return connect.NewResponse(&agentv1.DeleteSnapshotResponse{}), nil
}

// ListSnapshots implements hostagent.v1.
func (a *Agent) ListSnapshots(ctx context.Context, _ *connect.Request[agentv1.ListSnapshotsRequest]) (*connect.Response[agentv1.ListSnapshotsResponse], error) {
	manifests, err := a.engine.Templates()
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	out := &agentv1.ListSnapshotsResponse{}
	for _, m := range manifests {
		out.Snapshots = append(out.Snapshots, snapshotOf(m))
	}
	return connect.NewResponse(out), nil
}

var states = map[engine.State]agentv1.SandboxState{
	engine.Starting: agentv1.SandboxState_SANDBOX_STATE_STARTING,
	engine.Running:  agentv1.SandboxState_SANDBOX_STATE_RUNNING,
	engine.Pausing:  agentv1.SandboxState_SANDBOX_STATE_PAUSING,
	engine.Paused:   agentv1.SandboxState_SANDBOX_STATE_PAUSED,
	engine.Resuming: agentv1.SandboxState_SANDBOX_STATE_RESUMING,
	engine.Stopping: agentv1.SandboxState_SANDBOX_STATE_STOPPING,
	engine.Failed:   agentv1.SandboxState_SANDBOX_STATE_ERROR,
}

func sandboxOf(i engine.Info) *agentv1.Sandbox {
	s := &agentv1.Sandbox{
		Id: i.ID, State: states[i.State], Template: i.Template, Vcpus: uint32(i.VCPUs), MemoryMb: uint32(i.MemoryMB),
		Error: i.Error, CreatedAt: timestamppb.New(i.CreatedAt), Generation: i.Generation, Annotations: i.Annotations,
		Waiting: i.Waiting,
	}
	if i.StartedAt != nil {
		s.StartedAt = timestamppb.New(*i.StartedAt)
	}
	return s
}

func snapshotOf(m snapshot.Manifest) *agentv1.Snapshot {
	return &agentv1.Snapshot{
		Name: m.Name, Type: string(m.Kind), Vcpus: uint32(m.VMM.VCPUs), MemoryMb: uint32(m.VMM.MemoryMB),
		SizeBytes: uint64(m.Size), Generation: m.Generation, Parent: m.Parent, CreatedAt: timestamppb.New(m.CreatedAt),
		SourceSandboxId: m.SandboxID,
	}
}

func statsOf(s engine.Stats) *agentv1.OpStats {
	out := &agentv1.OpStats{
		DurationUs: s.Duration.Microseconds(), MemoryBytes: uint64(s.MemoryBytes), DiskBytes: uint64(s.DiskBytes),
		StateBytes: uint64(s.StateBytes), PhasesUs: map[string]int64{},
	}
	for name, d := range s.Phases {
		out.PhasesUs[name] = d.Microseconds()
	}
	return out
}
