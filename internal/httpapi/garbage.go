package httpapi

import (
	"net/http"
)

type garbageItem struct {
	Kind  string `json:"kind"`
	ID    string `json:"id"`
	Bytes int64  `json:"bytes"`
}

func (a *api) collectGarbage(w http.ResponseWriter, r *http.Request) error {
	var b struct {
		DryRun bool `json:"dry_run"`
	}
	if _, err := query(r); err != nil {
		return err
	}
	if err := readJSON(w, r, &b); err != nil {
		return err
	}
	g, err := a.svc.CollectGarbage(r.Context(), b.DryRun)
	if err != nil {
		return err
	}
	out := struct {
		DryRun bool          `json:"dry_run"`
		Bytes  int64         `json:"bytes"`
		Items  []garbageItem `json:"items"`
	}{DryRun: b.DryRun, Bytes: g.Bytes, Items: []garbageItem{}}
	for _, it := range g.Items {
		out.Items = append(out.Items, garbageItem{Kind: it.Kind, ID: it.ID, Bytes: it.Bytes})
	}
	return reply(w, http.StatusOK, out)
}
