package main

import (
	"context"
	"net/http"
	"path/filepath"

	"github.com/go-chi/chi/v5"
	"github.com/spf13/pflag"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/e2bapi"
	"git.omukk.dev/wrenn/sandbox/internal/oci"
	"git.omukk.dev/wrenn/sandbox/internal/store"
	"git.omukk.dev/wrenn/sandbox/internal/templatebuild"
)

// openTemplates starts what builds templates for the E2B SDKs, and gives the
// routes to its calls.
func (s *stack) openTemplates(ctx context.Context, o upOptions, db *store.DB, service *control.Service) (e2bapi.Options, error) {
	builder, err := templatebuild.New(ctx, templatebuild.Options{
		Store: db, Sandboxes: templatebuild.Service(service), Images: oci.NewPuller(o.images), Dir: filepath.Join(o.dir, "uploads"), Logger: s.log,
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

// registryFlags are the operator's say in where images come from.
type registryFlags struct {
	named  []string
	mirror string
}

func (r *registryFlags) flags(f *pflag.FlagSet) {
	f.StringArrayVar(&r.named, "registry", nil, "host[:port], or http://host[:port] without TLS, of a registry that templates may take images from although it is at a private address; may be repeated")
	f.StringVar(&r.mirror, "registry-mirror", "", "the same of a registry that has Docker Hub's images")
}

func (r registryFlags) options() (o oci.Options, err error) {
	for _, s := range r.named {
		one, err := oci.ParseRegistry(s)
		if err != nil {
			return o, usagef("--registry %v", err)
		}
		o.Registries = append(o.Registries, one)
	}
	if r.mirror != "" {
		m, err := oci.ParseRegistry(r.mirror)
		if err != nil {
			return o, usagef("--registry-mirror %v", err)
		}
		o.Mirror = &m
	}
	return o, nil
}
