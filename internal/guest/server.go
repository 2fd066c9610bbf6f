package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/internal/gen/filesystem/filesystemconnect"
	"git.omukk.dev/wrenn/sandbox/internal/gen/process/processconnect"
)

const (
	// Version is what the agent reports as envd_version. The published SDKs
	// switch features by it, so it follows theirs and not our own releases.
	Version = "0.6.13"
	// Port is where the agent listens.
	Port = 49983
	// Gateway is the host's address as every sandbox sees it.
	Gateway = "172.30.0.1"
	// RunDir holds the generation file, and the state that lets a restarted
	// agent go on. It is on a tmpfs.
	RunDir = "/run/wrenn"
	// DefaultsFile says what a template gives to processes.
	DefaultsFile = "/etc/wrenn/template.json"

	defaultUser = "user"
)

// Options configure a Server. The zero value is what runs in a sandbox.
type Options struct {
	// Addr is the address to listen on; empty is ":49983".
	Addr string
	// Gateway is the one address whose /init and /sync are accepted; the zero
	// value is Gateway.
	Gateway netip.Addr
	// System does what changes the whole guest; nil is the real one.
	System System
	// RunDir; empty is RunDir.
	RunDir string
	// Passwd and Group are the user database; empty is /etc/passwd, /etc/group.
	Passwd, Group string
	// TrustFile and TrustBundle are where certificates of the host go; empty is
	// TrustFile, TrustBundle.
	TrustFile, TrustBundle string
	// DefaultsFile is the template's; empty is DefaultsFile.
	DefaultsFile string
	// Logger; nil logs warnings to standard error.
	Logger *slog.Logger
	// Now; nil is time.Now.
	Now func() time.Time
}

// Server is the guest agent. Make it with New; it is safe for concurrent use.
type Server struct {
	opt      Options
	log      *slog.Logger
	sys      System
	accounts accounts
	procs    *processes
	watchers *watchers
	conns    *connections
	meter    meter

	initMu  sync.Mutex               // one /init at a time
	ident   atomic.Pointer[identity] // nil: not confirmed yet
	syncMu  sync.Mutex               // one /sync at a time
	trustMu sync.Mutex               // one /trust at a time
}

// New makes an agent. State that an earlier agent of this boot left in RunDir
// is taken over: its tokens go on being valid.
func New(o Options) (*Server, error) {
	if o.Addr == "" {
		o.Addr = fmt.Sprintf(":%d", Port)
	}
	if !o.Gateway.IsValid() {
		o.Gateway = netip.MustParseAddr(Gateway)
	}
	if o.RunDir == "" {
		o.RunDir = RunDir
	}
	if o.System == nil {
		o.System = NewSystem(o.RunDir)
	}
	if o.Passwd == "" {
		o.Passwd = "/etc/passwd"
	}
	if o.Group == "" {
		o.Group = "/etc/group"
	}
	if o.TrustFile == "" {
		o.TrustFile = TrustFile
	}
	if o.TrustBundle == "" {
		o.TrustBundle = TrustBundle
	}
	if o.DefaultsFile == "" {
		o.DefaultsFile = DefaultsFile
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &Server{
		opt: o, log: o.Logger, sys: o.System,
		accounts: accounts{o.Passwd, o.Group},
		procs:    newProcesses(),
		watchers: newWatchers(),
		conns:    newConnections(),
	}
	if err := s.loadState(); err != nil {
		s.log.Warn("earlier state is not usable", "error", err)
	}
	return s, nil
}

// Close ends the watchers. Processes are left alone: they belong to nobody.
func (s *Server) Close() error {
	s.watchers.closeAll()
	return nil
}

// Handler serves everything; it is for http.Server values made by NewHTTP.
func (s *Server) Handler() http.Handler {
	opts := []connect.HandlerOption{
		connect.WithReadMaxBytes(maxMessage),
		// Answers are never compressed: they cross one host's memory, and the
		// guest's processor may be emulated. Compressed requests are taken.
		connect.WithCompressMinBytes(math.MaxInt),
	}
	mux := http.NewServeMux()
	mux.Handle(processconnect.NewProcessHandler(processService{s}, opts...))
	mux.Handle(filesystemconnect.NewFilesystemHandler(filesystemService{s}, opts...))
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /init", s.handleInit)
	mux.HandleFunc("POST /sync", s.handleSync)
	mux.HandleFunc("POST /trust", s.handleTrust)
	mux.HandleFunc("GET /files", s.handleGetFile)
	mux.HandleFunc("POST /files", s.handlePostFiles)
	mux.HandleFunc("GET /metrics", s.handleMetrics)
	mux.HandleFunc("GET /envs", s.handleEnvs)
	return s.guard(mux)
}

// NewHTTP makes the HTTP server around the handler: HTTP/1.1 and HTTP/2
// without TLS, its connections known to /init.
func (s *Server) NewHTTP() *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           s.Handler(),
		Protocols:         protocols,
		ConnContext:       s.conns.context,
		ConnState:         s.conns.state,
		ReadHeaderTimeout: 30 * time.Second,
		// The pool of a proxy keeps connections for minutes.
		IdleTimeout:    10 * time.Minute,
		MaxHeaderBytes: 64 << 10,
		ErrorLog:       slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// Serve runs an agent until ctx ends. Processes that it started go on.
func Serve(ctx context.Context, o Options) error {
	s, err := New(o)
	if err != nil {
		return err
	}
	defer s.Close()
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", s.opt.Addr)
	if err != nil {
		return fmt.Errorf("listening for the host: %w", err)
	}
	h := s.NewHTTP()
	stop := context.AfterFunc(ctx, func() { _ = h.Close() })
	defer stop()
	if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the host: %w", err)
	}
	return nil
}

// connections knows the open connections, so that those of an earlier life
// can be closed.
type connections struct {
	mu   sync.Mutex
	open map[net.Conn]struct{}
}

type connKey struct{}

func newConnections() *connections { return &connections{open: map[net.Conn]struct{}{}} }

func (c *connections) context(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}

func (c *connections) state(conn net.Conn, st http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch st {
	case http.StateNew:
		c.open[conn] = struct{}{}
	case http.StateClosed, http.StateHijacked:
		delete(c.open, conn)
	}
}

// closeOthers resets all connections but the one of ctx: a reset, unlike an
// orderly end, tells a client that its stream was cut.
func (c *connections) closeOthers(ctx context.Context) int {
	own, _ := ctx.Value(connKey{}).(net.Conn)
	c.mu.Lock()
	var others []net.Conn
	for conn := range c.open {
		if conn != own {
			others = append(others, conn)
		}
	}
	c.mu.Unlock()
	for _, conn := range others {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = conn.Close()
	}
	return len(others)
}
