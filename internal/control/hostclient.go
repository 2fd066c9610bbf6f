package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1/hostagentv1connect"
)

// hostClient is Host over Connect RPC hostagent.v1.
type hostClient struct {
	c hostagentv1connect.HostAgentServiceClient
}

// NewHost makes a Host of a client. ExecStream needs a client that speaks
// HTTP/2.
func NewHost(c hostagentv1connect.HostAgentServiceClient) Host { return &hostClient{c: c} }

// hostError translates an error of the client. What the host itself said is
// certain by its contract, a lost answer is not, and a connection that was
// never made did nothing.
func hostError(err error) error {
	if err == nil {
		return nil
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return &Error{Code: CodeHostUnavailable, Message: "the host agent does not answer", Err: err}
	}
	ce, ok := errors.AsType[*connect.Error](err)
	if !ok || !connect.IsWireError(err) {
		return &Error{Code: CodeHostUnavailable, Message: "the connection to the host agent broke", Err: err, Uncertain: true}
	}
	code := CodeInternal
	switch ce.Code() {
	case connect.CodeInvalidArgument, connect.CodeOutOfRange:
		code = CodeInvalid
	case connect.CodeNotFound:
		code = CodeNotFound
	case connect.CodeAlreadyExists:
		code = CodeConflict
	case connect.CodeFailedPrecondition, connect.CodeAborted:
		code = CodeInvalidState
	case connect.CodeResourceExhausted, connect.CodeUnavailable:
		code = CodeHostUnavailable
	case connect.CodeDeadlineExceeded, connect.CodeCanceled:
		return &Error{Code: CodeHostUnavailable, Message: "the host agent did not finish in time", Err: err, Uncertain: true}
	}
	return &Error{Code: code, Message: ce.Message(), Err: err}
}

func fromTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func fromSandbox(p *hostagentv1.Sandbox) HostSandbox {
	h := HostSandbox{
		ID: p.GetId(), Template: p.GetTemplate(),
		VCPUs: int(p.GetVcpus()), MemoryMB: int(p.GetMemoryMb()),
		Error: p.GetError(), CreatedAt: fromTime(p.GetCreatedAt()),
		StartedAt: fromTime(p.GetStartedAt()), Annotations: p.GetAnnotations(), Waiting: p.GetWaiting(),
	}
	switch p.GetState() {
	case hostagentv1.SandboxState_SANDBOX_STATE_RUNNING:
		h.State = HostRunning
	case hostagentv1.SandboxState_SANDBOX_STATE_PAUSED:
		h.State = HostPaused
	case hostagentv1.SandboxState_SANDBOX_STATE_ERROR:
		h.State = HostError
	default:
		h.State = HostMoving
	}
	return h
}

func fromSnapshot(p *hostagentv1.Snapshot) Template {
	return Template{
		Name: p.GetName(), Type: p.GetType(),
		VCPUs: int(p.GetVcpus()), MemoryMB: int(p.GetMemoryMb()),
		SizeBytes: int64(p.GetSizeBytes()), Generation: int64(p.GetGeneration()),
		Parent: p.GetParent(), CreatedAt: fromTime(p.GetCreatedAt()), SourceID: p.GetSourceSandboxId(),
	}
}

func (h *hostClient) Info(ctx context.Context) (HostInfo, error) {
	r, err := h.c.GetHost(ctx, connect.NewRequest(&hostagentv1.GetHostRequest{}))
	if err != nil {
		return HostInfo{}, hostError(err)
	}
	m := r.Msg
	return HostInfo{
		Driver: m.GetDriver(), DriverVersion: m.GetDriverVersion(), Accelerator: m.GetAccelerator(),
		MemoryTotalMB: m.GetMemoryTotalMb(), MemoryFreeMB: m.GetMemoryFreeMb(),
		CPUs: m.GetCpus(), Version: m.GetVersion(),
	}, nil
}

func (h *hostClient) CreateSandbox(ctx context.Context, r HostCreate) (HostSandbox, error) {
	res, err := h.c.CreateSandbox(ctx, connect.NewRequest(&hostagentv1.CreateSandboxRequest{
		Id: r.ID, Template: r.Template, Vcpus: uint32(r.VCPUs), MemoryMb: uint32(r.MemoryMB),
		Envs: r.Envs, Annotations: r.Annotations, Egress: egressOf(r.Egress),
	}))
	if err != nil {
		return HostSandbox{}, hostError(err)
	}
	return expect(res.Msg.GetSandbox(), HostRunning)
}

// expect checks that an answer says what the call asked for.
func expect(p *hostagentv1.Sandbox, want HostState) (HostSandbox, error) {
	h := fromSandbox(p)
	if h.State != want {
		return h, &Error{
			Code: CodeInternal, Message: "the host agent answered with another state", Uncertain: true,
			Err: fmt.Errorf("sandbox %s is %s: %s", h.ID, p.GetState(), h.Error),
		}
	}
	return h, nil
}

func (h *hostClient) DestroySandbox(ctx context.Context, id string) error {
	_, err := h.c.DestroySandbox(ctx, connect.NewRequest(&hostagentv1.DestroySandboxRequest{Id: id}))
	return hostError(err)
}

func (h *hostClient) PauseSandbox(ctx context.Context, id string) (HostSandbox, error) {
	res, err := h.c.PauseSandbox(ctx, connect.NewRequest(&hostagentv1.PauseSandboxRequest{Id: id}))
	if err != nil {
		return HostSandbox{}, hostError(err)
	}
	return expect(res.Msg.GetSandbox(), HostPaused)
}

func (h *hostClient) ResumeSandbox(ctx context.Context, id string, reboot bool) (HostSandbox, error) {
	res, err := h.c.ResumeSandbox(ctx, connect.NewRequest(&hostagentv1.ResumeSandboxRequest{Id: id, Reboot: reboot}))
	if err != nil {
		return HostSandbox{}, hostError(err)
	}
	return expect(res.Msg.GetSandbox(), HostRunning)
}

func (h *hostClient) ListSandboxes(ctx context.Context) ([]HostSandbox, error) {
	res, err := h.c.ListSandboxes(ctx, connect.NewRequest(&hostagentv1.ListSandboxesRequest{}))
	if err != nil {
		return nil, hostError(err)
	}
	var out []HostSandbox
	for _, p := range res.Msg.GetSandboxes() {
		out = append(out, fromSandbox(p))
	}
	return out, nil
}

func (h *hostClient) WatchSandboxes(ctx context.Context, changed func(HostEvent)) error {
	st, err := h.c.WatchSandboxes(ctx, connect.NewRequest(&hostagentv1.WatchSandboxesRequest{}))
	if err != nil {
		return hostError(err)
	}
	defer st.Close()
	for st.Receive() {
		m := st.Msg()
		changed(HostEvent{Sandbox: fromSandbox(m.GetSandbox()), Removed: m.GetRemoved(), Synced: m.GetSynced()})
	}
	if err := st.Err(); err != nil {
		return hostError(err)
	}
	return errorf(CodeHostUnavailable, "the host agent ended the watch")
}

func (h *hostClient) CreateSnapshot(ctx context.Context, sandboxID, name string, replace bool) (Template, error) {
	res, err := h.c.CreateSnapshot(ctx, connect.NewRequest(&hostagentv1.CreateSnapshotRequest{SandboxId: sandboxID, Name: name, Replace: replace}))
	if err != nil {
		return Template{}, hostError(err)
	}
	return fromSnapshot(res.Msg.GetSnapshot()), nil
}

func (h *hostClient) DeleteSnapshot(ctx context.Context, name string) error {
	_, err := h.c.DeleteSnapshot(ctx, connect.NewRequest(&hostagentv1.DeleteSnapshotRequest{Name: name}))
	return hostError(err)
}

func (h *hostClient) ListSnapshots(ctx context.Context) ([]Template, error) {
	res, err := h.c.ListSnapshots(ctx, connect.NewRequest(&hostagentv1.ListSnapshotsRequest{}))
	if err != nil {
		return nil, hostError(err)
	}
	var out []Template
	for _, p := range res.Msg.GetSnapshots() {
		out = append(out, fromSnapshot(p))
	}
	return out, nil
}

func (h *hostClient) Metrics(ctx context.Context, id string) (Metrics, error) {
	res, err := h.c.GetSandboxMetrics(ctx, connect.NewRequest(&hostagentv1.GetSandboxMetricsRequest{SandboxId: id}))
	if err != nil {
		return Metrics{}, hostError(err)
	}
	m := res.Msg
	return Metrics{
		At: fromTime(m.GetAt()), CPUCount: m.GetCpuCount(), CPUUsedPct: m.GetCpuUsedPct(),
		MemTotal: m.GetMemTotal(), MemUsed: m.GetMemUsed(), MemCache: m.GetMemCache(),
		DiskTotal: m.GetDiskTotal(), DiskUsed: m.GetDiskUsed(),
		PrivateMemory: m.GetPrivateMemoryBytes(), Faults: m.GetFaults(),
	}, nil
}
