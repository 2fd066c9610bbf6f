package httpapi

import (
	"net/http"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

type snapshotBody struct {
	Name       string    `json:"name"`
	Type       string    `json:"type"`
	VCPUs      int       `json:"vcpus"`
	MemoryMB   int       `json:"memory_mb"`
	SizeBytes  int64     `json:"size_bytes"`
	Generation int64     `json:"generation"`
	Parent     string    `json:"parent,omitempty"`
	CreatedAt  time.Time `json:"created_at,omitzero"`
}

func toSnapshot(t control.Template) snapshotBody {
	return snapshotBody{
		Name: t.Name, Type: t.Type, VCPUs: t.VCPUs, MemoryMB: t.MemoryMB, SizeBytes: t.SizeBytes,
		Generation: t.Generation, Parent: t.Parent, CreatedAt: t.CreatedAt,
	}
}

func (a *api) createSnapshot(w http.ResponseWriter, r *http.Request) error {
	var b struct {
		SandboxID string `json:"sandbox_id"`
		Name      string `json:"name"`
	}
	if _, err := query(r); err != nil {
		return err
	}
	if err := readJSON(w, r, &b); err != nil {
		return err
	}
	t, err := a.svc.CreateSnapshot(r.Context(), b.SandboxID, b.Name)
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/v1/snapshots/"+t.Name)
	return reply(w, http.StatusCreated, toSnapshot(t))
}

func (a *api) listSnapshots(w http.ResponseWriter, r *http.Request) error {
	q, err := query(r, "type", "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := pageSize(q)
	if err != nil {
		return err
	}
	f := control.TemplateFilter{Type: q.Get("type"), Limit: limit + 1}
	if q.Has("type") && f.Type == "" {
		return control.Invalid("type", "must be %q or %q", control.TemplateBase, control.TemplateSnapshot)
	}
	if q.Has("cursor") {
		if f.After, err = parseCursor(q.Get("cursor")); err != nil {
			return err
		}
		if control.ValidateName("cursor", f.After) != nil {
			return badCursor
		}
	}
	list, err := a.svc.ListSnapshots(r.Context(), f)
	if err != nil {
		return err
	}
	out := struct {
		Snapshots  []snapshotBody `json:"snapshots"`
		NextCursor string         `json:"next_cursor,omitempty"`
	}{Snapshots: []snapshotBody{}}
	if len(list) > limit {
		list = list[:limit]
		out.NextCursor = cursorString(list[limit-1].Name)
	}
	for _, t := range list {
		out.Snapshots = append(out.Snapshots, toSnapshot(t))
	}
	return reply(w, http.StatusOK, out)
}

func (a *api) getSnapshot(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(r)
	if err != nil {
		return err
	}
	if _, err := query(r); err != nil {
		return err
	}
	t, err := a.svc.GetSnapshot(r.Context(), name)
	if err != nil {
		return err
	}
	return reply(w, http.StatusOK, toSnapshot(t))
}

func (a *api) deleteSnapshot(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(r)
	if err != nil {
		return err
	}
	if _, err := query(r); err != nil {
		return err
	}
	if err := a.svc.DeleteSnapshot(r.Context(), name); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
