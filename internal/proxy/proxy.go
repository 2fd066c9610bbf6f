package proxy

import (
	"context"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

const (
	// dialWait bounds the wait for a guest that does not take a connection.
	dialWait = 35 * time.Second
	// maxAnswerHeader bounds the headers of a guest's answer, and with the two
	// bounds below the memory that guests and strangers can have us hold.
	maxAnswerHeader = 64 << 10
	// idleBody is how long a request's body may stand still.
	idleBody = 5 * time.Minute
	// maxRequests bounds the requests in one sandbox at a time, maxAll those in
	// all of them.
	maxRequests = 2048
	maxAll      = 16384
	// copyBuffer is what a body passes through.
	copyBuffer = 64 << 10
)

// Options configure a Proxy. Service is required.
type Options struct {
	Service *control.Service
	// Logger: nil discards.
	Logger *slog.Logger
}

// Proxy carries requests into sandboxes. It is safe for concurrent use.
type Proxy struct {
	svc     *control.Service
	log     *slog.Logger
	reverse *httputil.ReverseProxy
	// agent keeps connections to guest agents, ports makes one for each
	// request: when a guest's program closes an idle one is its own affair.
	agent, ports *http.Transport

	mu  sync.Mutex
	n   map[string]int // requests under way, by sandbox
	all int
}

// New makes a Proxy.
func New(o Options) *Proxy {
	p := &Proxy{svc: o.Service, log: o.Logger, n: map[string]int{}}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	p.agent = &http.Transport{
		DialContext: p.dial, DisableCompression: true, MaxResponseHeaderBytes: maxAnswerHeader,
		MaxIdleConns: 1024, MaxIdleConnsPerHost: 32, IdleConnTimeout: time.Minute,
	}
	p.ports = &http.Transport{
		DialContext: p.dial, DisableCompression: true, MaxResponseHeaderBytes: maxAnswerHeader,
		DisableKeepAlives: true,
	}
	// As E2B has it, a sandbox's certificate proves nothing: the connection goes
	// to it in any case, and nobody is between.
	p.ports.TLSClientConfig = &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}
	p.reverse = &httputil.ReverseProxy{
		Rewrite: p.rewrite, Transport: roundTripper{p}, ErrorHandler: p.failed, ModifyResponse: narrowCookies, BufferPool: newBuffers(),
		ErrorLog: log.New(io.Discard, "", 0), // a stream that breaks is no news
	}
	return p
}

// Close ends the connections that are kept.
func (p *Proxy) Close() {
	p.agent.CloseIdleConnections()
	p.ports.CloseIdleConnections()
}

// Handler carries what is for a sandbox and hands everything else to next.
func (p *Proxy) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rt, ok := routeOf(r)
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		p.serve(w, r, rt)
	})
}

type targetKey struct{}

// target is the sandbox that a request goes to.
type target struct {
	sandbox control.Sandbox
	port    int
}

func targetOf(ctx context.Context) target { return ctx.Value(targetKey{}).(target) }

func (p *Proxy) serve(w http.ResponseWriter, r *http.Request, rt route) {
	if rt.bad != "" {
		answer(w, problem{rt.id, rt.bad, http.StatusBadRequest, 0})
		return
	}
	if bad, code := unforwarded(r, rt); bad != "" {
		answer(w, problem{rt.id, bad, code, 0})
		return
	}
	if rt.signed {
		sb, ok, err := p.svc.FindByToken(r.Context(), signedBy(r))
		if err != nil {
			p.refuse(w, r, rt, err)
			return
		}
		if !ok {
			answer(w, problem{"", "invalid signature", http.StatusUnauthorized, 0})
			return
		}
		rt.id = sb.ID
	}
	if !p.enter(rt.id) {
		w.Header().Set("Retry-After", "1")
		answer(w, problem{rt.id, "the sandbox has too many requests under way", http.StatusTooManyRequests, 0})
		return
	}
	defer p.leave(rt.id)
	sb, err := p.reach(r, rt)
	if err != nil {
		p.refuse(w, r, rt, err)
		return
	}
	defer p.svc.Active(rt.id)()
	ctx := context.WithValue(r.Context(), targetKey{}, target{sb, rt.port})
	r = r.WithContext(ctx)
	if r.Body != nil && r.Body != http.NoBody && !strings.HasPrefix(r.Header.Get("Content-Type"), "application/connect+") {
		r.Body = &pacedBody{ReadCloser: r.Body, rc: http.NewResponseController(w)}
	}
	p.reverse.ServeHTTP(w, r)
}

// errPrivate refuses traffic without the token that a private port asks for.
var errPrivate = errors.New("private")

// reach finds the sandbox and, where it may, wakes it. A private port asks for
// its token first: a stranger must not wake a sandbox.
func (p *Proxy) reach(r *http.Request, rt route) (control.Sandbox, error) {
	sb, err := p.svc.Get(r.Context(), rt.id)
	if err != nil {
		return sb, err
	}
	if rt.port != EnvdPort && sb.Options.PrivatePorts {
		got, want := r.Header.Get(trafficHeader), sb.Options.TrafficToken
		if want == "" || subtle.ConstantTimeCompare([]byte(got), []byte(want)) != 1 {
			return sb, errPrivate
		}
	}
	if sb.Status == control.StatusRunning {
		return sb, nil
	}
	return p.svc.Reach(r.Context(), rt.id)
}

func (p *Proxy) enter(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n[id] >= maxRequests || p.all >= maxAll {
		return false
	}
	p.n[id]++
	p.all++
	return true
}

func (p *Proxy) leave(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all--
	if p.n[id]--; p.n[id] == 0 {
		delete(p.n, id)
	}
}

// rewrite makes the request that the guest gets. The URL's host is no name:
// it tells the connections of one run of one sandbox's port from all others.
func (p *Proxy) rewrite(r *httputil.ProxyRequest) {
	t := targetOf(r.In.Context())
	run := strconv.FormatInt(t.sandbox.StartedAt.UnixMicro(), 36)
	scheme := "http"
	if slices.Contains(t.sandbox.Options.HTTPSPorts, t.port) {
		scheme = "https"
	}
	r.SetURL(&url.URL{Scheme: scheme, Host: t.sandbox.ID + "." + run + ":" + strconv.Itoa(t.port)})
	r.Out.URL.Path, r.Out.URL.RawPath, r.Out.URL.RawQuery = r.In.URL.Path, r.In.URL.RawPath, r.In.URL.RawQuery
	r.Out.Host = r.In.Host
	if mask := t.sandbox.Options.HostMask; mask != "" && t.port != EnvdPort {
		r.Out.Host = strings.ReplaceAll(mask, "${PORT}", strconv.Itoa(t.port))
	}
	for _, h := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", trafficHeader} {
		r.Out.Header.Del(h)
	}
	r.SetXForwarded()
}

// roundTripper sends a request through the transport of its kind.
type roundTripper struct{ p *Proxy }

func (t roundTripper) RoundTrip(r *http.Request) (*http.Response, error) {
	if targetOf(r.Context()).port == EnvdPort {
		return t.p.agent.RoundTrip(r)
	}
	return t.p.ports.RoundTrip(r)
}

// dial connects to what the request's context names; the address is not used.
func (p *Proxy) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	t, ok := ctx.Value(targetKey{}).(target)
	if !ok {
		return nil, errors.New("a connection without a target")
	}
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	return p.svc.Dial(ctx, t.sandbox.ID, t.port)
}

// failed answers for a guest that did not.
func (p *Proxy) failed(w http.ResponseWriter, r *http.Request, err error) {
	t := targetOf(r.Context())
	p.refuse(w, r, route{id: t.sandbox.ID, port: t.port}, err)
}

// refuse tells the client what became of its request.
func (p *Proxy) refuse(w http.ResponseWriter, r *http.Request, rt route, err error) {
	ctx := context.WithoutCancel(r.Context())
	var tooLarge *http.MaxBytesError
	switch {
	case errors.Is(err, errPrivate):
		answer(w, problem{rt.id, "the port is private: send the sandbox's traffic access token as " + trafficHeader, http.StatusForbidden, rt.port})
		return
	case errors.Is(err, control.ErrPortClosed):
		answer(w, problem{rt.id, "The sandbox is running but port is not open", http.StatusBadGateway, rt.port})
		return
	case errors.As(err, &tooLarge):
		answer(w, problem{rt.id, "the body is too large", http.StatusRequestEntityTooLarge, 0})
		return
	case control.CodeOf(err) == control.CodeInvalid:
		answer(w, problem{rt.id, err.Error(), http.StatusBadRequest, 0})
		return
	}
	if sb, rowErr := p.svc.Get(ctx, rt.id); rowErr != nil || sb.Status != control.StatusRunning {
		answer(w, problem{rt.id, "The sandbox was not found", http.StatusBadGateway, 0})
		return
	}
	p.log.InfoContext(ctx, "request into a sandbox failed", "sandbox", rt.id, "port", rt.port, "err", err)
	answer(w, problem{rt.id, "The sandbox did not answer", http.StatusBadGateway, 0})
}
