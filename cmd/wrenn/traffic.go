package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/e2bapi"
	"git.omukk.dev/wrenn/sandbox/internal/localca"
	"git.omukk.dev/wrenn/sandbox/internal/proxy"
)

// trafficOptions are the flags of `wrenn up` about the way into sandboxes.
type trafficOptions struct {
	domain       string
	tlsListen    string
	tlsCert      string
	tlsKey       string
	privatePorts bool
}

func (t *trafficOptions) flags(f *pflag.FlagSet) {
	f.StringVar(&t.domain, "domain", "", "domain whose names <port>-<sandbox>.<domain> lead here (default localhost)")
	f.StringVar(&t.tlsListen, "tls-listen", "", "serve the same over TLS on this address, and api.<domain> for the E2B SDKs")
	f.StringVar(&t.tlsCert, "tls-cert", "", "file of the certificate for *.<domain> (default: one of a local authority, see wrenn ca)")
	f.StringVar(&t.tlsKey, "tls-key", "", "file of the certificate's key")
	f.BoolVar(&t.privatePorts, "private-ports", false, "ask for a sandbox's traffic token on its published ports unless its creation says otherwise")
}

var domainRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)

func (t *trafficOptions) check() error {
	if t.domain == "" && t.tlsListen != "" {
		return usagef("--tls-listen needs --domain: TLS is for names, and the certificate is for *.<domain>")
	}
	if t.domain == "" {
		t.domain = "localhost"
	}
	switch {
	case len(t.domain) > 200 || !domainRE.MatchString(t.domain):
		return usagef("--domain %q is no domain name in lower case, without a port", t.domain)
	case (t.tlsCert == "") != (t.tlsKey == ""):
		return usagef("--tls-cert and --tls-key go together")
	case t.tlsCert != "" && t.tlsListen == "":
		return usagef("--tls-cert needs --tls-listen")
	}
	return nil
}

// published is the domain with the port where clients need it.
func (t *trafficOptions) published(plain, secure net.Listener) string {
	l, usual := plain, "80"
	if secure != nil {
		l, usual = secure, "443"
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil || port == usual {
		return t.domain
	}
	return net.JoinHostPort(t.domain, port)
}

// openTraffic puts the E2B surface and the way into sandboxes in front of the
// API's handler. e holds the routes of others.
func (s *stack) openTraffic(o upOptions, service *control.Service, api http.Handler, e e2bapi.Options) {
	history := e2bapi.NewHistory(service)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(e2bapi.SampleEvery)
		defer tick.Stop()
		history.Run(ctx, tick.C)
	})
	s.push(func() error { cancel(); wg.Wait(); return nil })
	e.Service, e.History, e.Domain, e.PrivatePorts, e.Logger = service, history, o.published, o.traffic.privatePorts, s.log
	e2b := e2bapi.New(e)
	p := proxy.New(proxy.Options{Service: service, Logger: s.log})
	s.push(func() error { p.Close(); return nil })
	s.handler = p.Handler(byHost("api."+o.traffic.domain, e2b, underE2B(e2b, api)))
}

// underE2B sends what is below /e2b/ to its handler. A ServeMux would redirect
// names with percent-encoded slashes.
func underE2B(e2b, api http.Handler) http.Handler {
	under := http.StripPrefix("/e2b", e2b)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/e2b/") {
			under.ServeHTTP(w, r)
			return
		}
		api.ServeHTTP(w, r)
	})
}

// byHost sends requests for one host to its handler.
func byHost(host string, h, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := r.Host
		if n, _, err := net.SplitHostPort(name); err == nil {
			name = n
		}
		if strings.EqualFold(name, host) {
			h.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// newServer is a server for clients who are strangers.
func newServer(h http.Handler, log *slog.Logger) *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler: h, Protocols: &protocols, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 128 << 10,
		IdleTimeout: 10 * time.Minute, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		// One client holds streams of many sandboxes on one connection.
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 1000},
	}
}

// listenTLS listens where the flags say; nil where they do not.
func listenTLS(o upOptions) (net.Listener, error) {
	if o.traffic.tlsListen == "" {
		return nil, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	if o.traffic.tlsCert != "" {
		c, err := tls.LoadX509KeyPair(o.traffic.tlsCert, o.traffic.tlsKey)
		if err != nil {
			return nil, fmt.Errorf("read the certificate: %w", err)
		}
		cfg.Certificates = []tls.Certificate{c}
	} else {
		ca, err := localca.Open(filepath.Join(o.dir, "ca"), o.traffic.domain, time.Now)
		if err != nil {
			return nil, err
		}
		cfg.GetCertificate = ca.GetCertificate
	}
	l, err := net.Listen("tcp", o.traffic.tlsListen)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w; --tls-listen chooses another address", o.traffic.tlsListen, err)
	}
	return tls.NewListener(l, cfg), nil
}

// serveAll serves on the listeners until one fails.
func serveAll(srv *http.Server, listeners ...net.Listener) <-chan error {
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- err
			}
		}()
	}
	return failed
}
