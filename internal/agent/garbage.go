package agent

import (
	"context"

	"connectrpc.com/connect"

	agentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
)

// CollectGarbage implements hostagent.v1.
func (a *Agent) CollectGarbage(ctx context.Context, req *connect.Request[agentv1.CollectGarbageRequest]) (*connect.Response[agentv1.CollectGarbageResponse], error) {
	r, err := a.engine.CollectGarbage(ctx, req.Msg.DryRun)
	if err != nil {
		return nil, a.wire(ctx, err)
	}
	out := &agentv1.CollectGarbageResponse{Bytes: r.Bytes}
	for _, it := range r.Items {
		out.Items = append(out.Items, &agentv1.GarbageItem{Kind: string(it.Kind), Id: it.ID.String(), Bytes: it.Bytes})
	}
	return connect.NewResponse(out), nil
}
