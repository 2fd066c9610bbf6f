package egress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/hostnet"
)

// Authority makes the certificates by which guests know the hosts that are
// taken from them.
type Authority interface {
	Certificate(name string, others ...string) (*tls.Certificate, error)
}

// Options of a Web.
type Options struct {
	Rules     Rules
	Authority Authority
	// Roots are trusted to certify hosts; nil is the system's.
	Roots  *x509.CertPool
	Logger *slog.Logger
}

// New makes what completes one guest's requests.
func New(o Options) hostnet.Web { return &web{o} }

type web struct{ o Options }

// Bounds of what one guest's connections hold, and wait. A guest that does not
// read, or whose host does not, has us keep no more than the buffers.
const (
	maxStreams   = 32
	maxRequests  = 512 // of one guest at a time
	streamBuffer = 64 << 10
	connBuffer   = 512 << 10
	maxAnswer    = 256 << 10 // of an answer's headers
	headerWait   = 30 * time.Second
	idleWait     = 2 * time.Minute
	dialWait     = 15 * time.Second
)

// proxy is a web at work for one slot.
type proxy struct {
	Options
	way    hostnet.Way
	ctx    context.Context
	cancel context.CancelFunc
	server *http.Server
	taken  *feed
	out    *http.Transport
	turns  chan struct{}
}

// Open implements hostnet.Web.
func (w *web) Open(way hostnet.Way) hostnet.WebHandler {
	p := &proxy{Options: w.o, way: way, taken: newFeed(), turns: make(chan struct{}, maxRequests)}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.out = &http.Transport{
		DialContext: p.dialName, TLSHandshakeTimeout: dialWait, IdleConnTimeout: idleWait,
		MaxIdleConnsPerHost: 8, MaxIdleConns: 64, DisableCompression: true, ForceAttemptHTTP2: true,
		TLSClientConfig: &tls.Config{RootCAs: p.Roots}, MaxResponseHeaderBytes: maxAnswer,
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: streamBuffer, MaxReceiveBufferPerConnection: connBuffer},
	}
	p.server = &http.Server{
		Handler: p, ReadHeaderTimeout: headerWait, IdleTimeout: idleWait, MaxHeaderBytes: maxPeek,
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: maxStreams,
			MaxReceiveBufferPerStream: streamBuffer, MaxReceiveBufferPerConnection: connBuffer},
		BaseContext: func(net.Listener) context.Context { return p.ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if t, ok := c.(*tls.Conn); ok {
				c = t.NetConn()
			}
			return context.WithValue(ctx, flowKey{}, c.(*flow))
		},
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0), // a guest's doings
	}
	go func() { _ = p.server.Serve(p.taken) }() // ends with Close
	return p
}

// Close implements hostnet.WebHandler. It waits for nobody.
func (p *proxy) Close() {
	p.cancel()
	_ = p.server.Close()
	p.out.CloseIdleConnections()
}

// flow is a connection that was taken: all its requests are for one host.
type flow struct {
	*rewound
	host   string
	port   uint16
	secure bool
	over   chan struct{}
	once   sync.Once
}

type flowKey struct{}

func (f *flow) Close() error {
	f.once.Do(func() { close(f.over) })
	return f.rewound.Close()
}

// Handle implements hostnet.WebHandler.
func (p *proxy) Handle(conn net.Conn, to netip.AddrPort) {
	defer conn.Close()
	defer context.AfterFunc(p.ctx, func() { conn.Close() })()
	c, host, secure := peek(conn)
	if len(p.Rules.find(host)) == 0 {
		p.pass(c, to)
		return
	}
	f := &flow{rewound: c, host: host, port: to.Port(), secure: secure, over: make(chan struct{})}
	var taken net.Conn = f
	if secure {
		taken = tls.Server(f, &tls.Config{NextProtos: []string{"h2", "http/1.1"},
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.Authority.Certificate(host) }})
	}
	if p.taken.give(taken) {
		<-f.over // its turn lasts as long as it does
	}
}

// pass connects the guest with the address that it meant.
func (p *proxy) pass(c *rewound, to netip.AddrPort) {
	ctx, cancel := context.WithTimeout(p.ctx, dialWait)
	defer cancel()
	out, err := p.way.Dial(ctx, to)
	if err != nil {
		p.Logger.Debug("pass on a guest's connection", "to", to, "error", err)
		if t, ok := c.Conn.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // a reset: the end of a stream would say more than happened
		}
		return
	}
	defer out.Close()
	defer context.AfterFunc(p.ctx, func() { out.Close() })()
	var back sync.WaitGroup
	back.Go(func() { join(c, out) })
	join(out, c)
	back.Wait()
}

// join copies one direction and ends it; a broken one ends both.
func join(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if w, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		err = w.CloseWrite()
	}
	if err != nil {
		to.Close()
		from.Close()
	}
}

// ServeHTTP completes a request and sends it on.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f := r.Context().Value(flowKey{}).(*flow)
	switch {
	case hostOf(r.Host) != f.host:
		// Who shares one connection between names asks again on another.
		http.Error(w, "this connection is for "+f.host, http.StatusMisdirectedRequest)
		return
	case r.Method == http.MethodTrace || r.Method == http.MethodConnect:
		http.Error(w, r.Method+" is not passed on", http.StatusMethodNotAllowed)
		return
	}
	select {
	case p.turns <- struct{}{}:
		defer func() { <-p.turns }()
	default:
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many requests are under way", http.StatusTooManyRequests)
		return
	}
	headers := p.Rules.find(f.host)
	(&httputil.ReverseProxy{
		Transport: p.out, FlushInterval: -1,
		ErrorLog:     slog.NewLogLogger(slog.DiscardHandler, 0),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) { p.failed(w, f.host, err) },
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL.Scheme, pr.Out.URL.Host = "http", net.JoinHostPort(f.host, strconv.Itoa(int(f.port)))
			if f.secure {
				pr.Out.URL.Scheme = "https"
			}
			pr.Out.Host, pr.Out.URL.RawQuery = pr.In.Host, pr.In.URL.RawQuery
			for _, h := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if v := pr.In.Header[h]; v != nil {
					pr.Out.Header[h] = v
				}
			}
			for name, value := range headers {
				pr.Out.Header.Set(name, value)
			}
		},
	}).ServeHTTP(w, r)
}

// failed tells the guest that its request did not come through; not more than
// it could find out itself.
func (p *proxy) failed(w http.ResponseWriter, host string, err error) {
	if p.ctx.Err() == nil && !errors.Is(err, context.Canceled) {
		p.Logger.Debug("complete a guest's request", "host", host, "error", err)
	}
	text := "it cannot be reached"
	var cert *tls.CertificateVerificationError
	switch {
	case errors.As(err, &cert):
		text = "its certificate is not valid for this name"
	case errors.Is(err, errNoAddress):
		text = "it has no public address"
	}
	http.Error(w, host+": "+text, http.StatusBadGateway)
}

var errNoAddress = errors.New("no public address")

// dialName finds a host itself: the guest's word does not count.
func (p *proxy) dialName(ctx context.Context, _, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("port %q: %w", port, err)
	}
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	addrs, err := p.way.Lookup(ctx, host)
	if err != nil {
		return nil, fmt.Errorf("look up %s: %w", host, err)
	}
	err = errNoAddress
	for i, a := range addrs {
		// The others have a share of what is left of the time.
		tctx, cancel := context.WithTimeout(ctx, dialWait/time.Duration(len(addrs)-i+1))
		var c net.Conn
		c, err = p.way.Dial(tctx, netip.AddrPortFrom(a, uint16(n)))
		cancel()
		if err == nil {
			// A host that never answers is a guest's to hang up on; one that is
			// gone is noticed by TCP.
			if p.ctx.Err() != nil {
				c.Close()
				return nil, p.ctx.Err()
			}
			return c, nil
		}
	}
	return nil, err
}

// feed is a listener of connections that are there already.
type feed struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newFeed() *feed { return &feed{conns: make(chan net.Conn), done: make(chan struct{})} }

// give tells whether somebody took it.
func (f *feed) give(c net.Conn) bool {
	select {
	case f.conns <- c:
		return true
	case <-f.done:
		return false
	}
}

// Accept implements net.Listener.
func (f *feed) Accept() (net.Conn, error) {
	select {
	case c := <-f.conns:
		return c, nil
	case <-f.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (f *feed) Close() error {
	f.once.Do(func() { close(f.done) })
	return nil
}

// Addr implements net.Listener.
func (f *feed) Addr() net.Addr { return &net.TCPAddr{} }
