package control

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/internal/gen/hostagent/v1"
)

// Garbage is what nothing needs any more in a host's store.
type Garbage struct {
	Items []GarbageItem
	Bytes int64
}

// GarbageItem is one thing of it. Kind is "snapshot" (unfinished), "image",
// "header" (of an image whose blocks others need) or "file" (temporary).
type GarbageItem struct {
	Kind, ID string
	Bytes    int64
}

// CollectGarbage frees what nothing needs any more on the host, or tells what
// it would free.
func (s *Service) CollectGarbage(ctx context.Context, dryRun bool) (g Garbage, err error) {
	ctx, cancel := s.detach(ctx)
	defer cancel()
	defer s.observe("collect_garbage")(&err)
	g, err = s.host.CollectGarbage(ctx, dryRun)
	if err != nil {
		return Garbage{}, fmt.Errorf("collect garbage: %w", err)
	}
	return g, nil
}

func (h *hostClient) CollectGarbage(ctx context.Context, dryRun bool) (Garbage, error) {
	res, err := h.c.CollectGarbage(ctx, connect.NewRequest(&hostagentv1.CollectGarbageRequest{DryRun: dryRun}))
	if err != nil {
		return Garbage{}, hostError(err)
	}
	g := Garbage{Bytes: res.Msg.GetBytes()}
	for _, it := range res.Msg.GetItems() {
		g.Items = append(g.Items, GarbageItem{Kind: it.GetKind(), ID: it.GetId(), Bytes: it.GetBytes()})
	}
	return g, nil
}
