package clienttest

import (
	"net/http"
	"slices"

	"git.omukk.dev/wrenn/sandbox/client"
)

func (s *Server) snapshot(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		SandboxID string `json:"sandbox_id"`
		Name      string `json:"name"`
	}
	if err := decode(r, &in); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.sandboxes, func(sb client.Sandbox) bool { return sb.ID == in.SandboxID })
	if i < 0 {
		return notFound("there is no sandbox " + in.SandboxID)
	}
	if slices.ContainsFunc(s.snapshots, func(t client.Snapshot) bool { return t.Name == in.Name }) {
		return &client.Error{Status: 409, Code: client.CodeConflict, Message: "the name " + in.Name + " is taken"}
	}
	sb := s.sandboxes[i]
	t := client.Snapshot{Name: in.Name, Type: client.SnapshotTypeSnapshot, VCPUs: sb.VCPUs, MemoryMB: sb.MemoryMB,
		SizeBytes: 1536 << 10, Generation: 1, Parent: sb.Template, CreatedAt: Epoch}
	s.snapshots = append(s.snapshots, t)
	return reply(w, 201, t)
}

func (s *Server) listSnapshots(w http.ResponseWriter, r *http.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var match []client.Snapshot
	for _, t := range s.snapshots {
		if kind := r.URL.Query().Get("type"); kind == "" || kind == t.Type {
			match = append(match, t)
		}
	}
	page, next, err := paginate(s.PageSize, r, match)
	if err != nil {
		return err
	}
	return reply(w, 200, client.SnapshotPage{Snapshots: page, NextCursor: next})
}

func (s *Server) getSnapshot(w http.ResponseWriter, r *http.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.snapshots {
		if t.Name == r.PathValue("name") {
			return reply(w, 200, t)
		}
	}
	return notFound("there is no snapshot " + r.PathValue("name"))
}

func (s *Server) deleteSnapshot(w http.ResponseWriter, r *http.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.snapshots)
	s.snapshots = slices.DeleteFunc(s.snapshots, func(t client.Snapshot) bool { return t.Name == r.PathValue("name") })
	if len(s.snapshots) == n {
		return notFound("there is no snapshot " + r.PathValue("name"))
	}
	w.WriteHeader(204)
	return nil
}
