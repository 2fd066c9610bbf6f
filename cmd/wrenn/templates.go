package main

import (
	"context"
	"net/http"
	"path/filepath"

	"github.com/go-chi/chi/v5"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/e2bapi"
	"git.omukk.dev/wrenn/sandbox/internal/store"
	"git.omukk.dev/wrenn/sandbox/internal/templatebuild"
)

// openTemplates starts what builds templates for the E2B SDKs, and gives the
// routes to its calls.
func (s *stack) openTemplates(ctx context.Context, o upOptions, db *store.DB, service *control.Service) (e2bapi.Options, error) {
	builder, err := templatebuild.New(ctx, templatebuild.Options{
		Store: db, Sandboxes: templatebuild.Service(service), Dir: filepath.Join(o.dir, "uploads"), Logger: s.log,
	})
	if err != nil {
		return e2bapi.Options{}, err
	}
	s.push(builder.Close)
	type failer = func(http.ResponseWriter, *http.Request, error)
	return e2bapi.Options{
		More:   func(r chi.Router, fail failer) { templatebuild.NewAPI(builder, fail).Routes(r) },
		Public: func(r chi.Router, fail failer) { templatebuild.NewAPI(builder, fail).PublicRoutes(r) },
	}, nil
}
