package httpapi

import (
	_ "embed"
	"log/slog"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

//go:embed openapi.yaml
var openAPI []byte

// Options configure the handler. Service is required.
type Options struct {
	Service *control.Service
	// Logger: nil discards.
	Logger *slog.Logger
	// Metrics holds the figures of GET /metrics; nil: NewMetrics.
	Metrics *Metrics
	// Limiter bounds what one API key may ask for; nil: DefaultLimits.
	Limiter *Limiter
	// Checks are asked by GET /readyz besides the service's own.
	Checks []control.Check
}

type api struct {
	svc     *control.Service
	log     *slog.Logger
	metrics *Metrics
	limiter *Limiter
}

// New makes the handler of the whole API. It sets no time limits on
// connections: an exec or an upload may take as long as its own limits allow.
// The server around it should set ReadHeaderTimeout.
func New(o Options) http.Handler {
	a := &api{svc: o.Service, log: o.Logger, metrics: o.Metrics, limiter: o.Limiter}
	if a.limiter == nil {
		a.limiter = NewLimiter(DefaultLimits)
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.metrics == nil {
		a.metrics = NewMetrics()
	}
	// An own registry per handler: the service's gauge may be had only once.
	reg := prometheus.NewRegistry()
	reg.MustRegister(a.metrics, &sandboxGauge{svc: a.svc})

	r := chi.NewRouter()
	r.Use(a.requestID, a.record, a.recoverPanic)
	r.NotFound(a.do(func(http.ResponseWriter, *http.Request) error {
		return &control.Error{Code: control.CodeNotFound, Message: "there is no such path; GET /openapi.yaml lists them all"}
	}))
	r.MethodNotAllowed(a.methodNotAllowed)
	r.Get("/healthz", a.health(newHealth(a.svc.LiveChecks(), 0)))
	r.Get("/readyz", a.health(newHealth(append(a.svc.ReadyChecks(), o.Checks...), readyFor)))
	r.Method(http.MethodGet, "/metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	r.Get("/openapi.yaml", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/yaml")
		_, _ = w.Write(openAPI) // A client that went away needs no answer.
	})
	r.Route("/v1", func(r chi.Router) {
		r.Use(a.authenticate, a.limit)
		a.routes(r)
	})
	return r
}

func (a *api) routes(r chi.Router) {
	r.Post("/sandboxes", a.once(a.createSandbox))
	r.Get("/sandboxes", a.do(a.listSandboxes))
	r.Get("/sandboxes/{id}", a.do(a.getSandbox))
	r.Delete("/sandboxes/{id}", a.do(a.deleteSandbox))
	r.Post("/sandboxes/{id}/pause", a.once(a.pauseSandbox))
	r.Post("/sandboxes/{id}/resume", a.once(a.resumeSandbox))
	r.Post("/sandboxes/{id}/timeout", a.once(a.setTimeout))
	r.Post("/sandboxes/{id}/fork", a.once(a.forkSandbox))
	r.Get("/sandboxes/{id}/metrics", a.do(a.sandboxMetrics))
	r.Get("/sandboxes/{id}/events", a.do(a.listEvents))

	r.Post("/sandboxes/{id}/exec", a.once(a.exec))
	r.Get("/sandboxes/{id}/exec/stream", a.do(a.execStream))
	r.Get("/sandboxes/{id}/pty", a.do(a.pty))

	r.Get("/sandboxes/{id}/files", a.do(a.readFile))
	r.Put("/sandboxes/{id}/files", a.do(a.writeFile))
	r.Delete("/sandboxes/{id}/files", a.do(a.removeFile))
	r.Get("/sandboxes/{id}/files/list", a.do(a.listFiles))
	r.Post("/sandboxes/{id}/files/mkdir", a.once(a.makeDir))

	r.Post("/snapshots", a.once(a.createSnapshot))
	r.Get("/snapshots", a.do(a.listSnapshots))
	r.Get("/snapshots/{name}", a.do(a.getSnapshot))
	r.Delete("/snapshots/{name}", a.do(a.deleteSnapshot))

	r.Post("/store/gc", a.once(a.collectGarbage))
}

// pathID gives the sandbox ID of the path.
func pathID(r *http.Request) (string, error) {
	id := chi.URLParam(r, "id")
	return id, control.ValidateID("id", id)
}

func pathName(r *http.Request) (string, error) {
	name := chi.URLParam(r, "name")
	return name, control.ValidateName("name", name)
}
