package e2bapi

import (
	"net/http"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// snapshot is a named or nameless snapshot. Its ID is its name here.
type snapshot struct {
	SnapshotID string   `json:"snapshotID"`
	Names      []string `json:"names"`
}

func (a *api) createSnapshot(w http.ResponseWriter, r *http.Request) error {
	var b struct {
		Name   string `json:"name"`
		Memory *bool  `json:"memory"`
	}
	id, err := body(w, r, &b)
	if err != nil {
		return err
	}
	if b.Memory != nil && !*b.Memory {
		return control.Invalid("memory", "false is not supported: a snapshot keeps memory and disk; pause without memory works")
	}
	name := templateName(b.Name)
	if name == "" {
		name = "snap-" + control.NewID()
	}
	if _, err := a.svc.ReplaceSnapshot(r.Context(), id, name); err != nil {
		return err
	}
	reply(w, http.StatusCreated, snapshot{name, []string{name}})
	return nil
}

func (a *api) listSnapshots(w http.ResponseWriter, r *http.Request) error {
	v := r.URL.Query()
	p, err := pageOf(v)
	if err != nil {
		return err
	}
	all, err := a.svc.SnapshotsOf(r.Context(), v.Get("sandboxID"))
	if err != nil {
		return err
	}
	name := templateName(v.Get("name"))
	var rows []control.Template
	for _, t := range all {
		if name == "" || name == t.Name {
			rows = append(rows, t)
		}
	}
	out := []snapshot{}
	for _, t := range paged(w, rows, p, false, func(t control.Template) place { return place{t.CreatedAt, t.Name} }) {
		out = append(out, snapshot{t.Name, []string{t.Name}})
	}
	reply(w, http.StatusOK, out)
	return nil
}

// deleteSnapshot is a delete of a template to the SDKs. A name that cannot be
// one is not there.
func (a *api) deleteSnapshot(w http.ResponseWriter, r *http.Request) error {
	name, err := pathName(r)
	if err != nil {
		return err
	}
	if control.ValidateName("templateID", name) != nil {
		return &control.Error{Code: control.CodeNotFound, Message: "there is no such snapshot"}
	}
	if err := a.svc.DeleteSnapshot(r.Context(), name); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// forked is one child: a sandbox, or why there is none.
type forked struct {
	Sandbox *sandbox   `json:"sandbox,omitempty"`
	Error   *errorBody `json:"error,omitempty"`
}

func (a *api) fork(w http.ResponseWriter, r *http.Request) error {
	b := struct {
		Timeout *int64 `json:"timeout"`
		Count   int64  `json:"count"`
	}{Count: 1}
	id, err := body(w, r, &b)
	if err != nil {
		return err
	}
	sec := int64(defaultTimeout)
	if b.Timeout != nil {
		if sec = *b.Timeout; sec < 1 || sec > control.MaxTimeoutSec {
			return control.Invalid("timeout", "must be 1 to %d seconds; got %d", control.MaxTimeoutSec, sec)
		}
	}
	children, err := a.svc.Fork(r.Context(), id, b.Count)
	if err != nil {
		return err
	}
	out := []forked{}
	for _, c := range children {
		var f forked
		err := c.Err
		if err == nil {
			_, err = a.svc.SetDeadline(r.Context(), c.Sandbox.ID, sec)
		}
		if err == nil {
			var sb sandbox
			sb, err = a.sandboxOf(r, c.Sandbox)
			f.Sandbox = &sb
		}
		if err != nil {
			code, message := verdict(err)
			f = forked{Error: &errorBody{code, message}}
		}
		out = append(out, f)
	}
	reply(w, http.StatusCreated, out)
	return nil
}
