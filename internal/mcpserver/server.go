package mcpserver

import (
	"log/slog"
	"net/http"
	"strings"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"git.omukk.dev/wrenn/sandbox/client"
)

const instructions = `Sandboxes are small virtual machines in which code can run that nobody has checked.

Typical use: create_sandbox, then run_command, run_python, write_file and read_file in it, and
destroy_sandbox at the end. Files and running processes stay between calls.

A sandbox that is not needed for a while: pause_sandbox; resume_sandbox brings it back with every
process still running. A prepared one (packages installed, servers started): snapshot_sandbox
freezes it under a name, and create_from_snapshot starts new ones in exactly that state.`

// Options say what a server offers.
type Options struct {
	// Client calls the Wrenn server; required.
	Client *client.Client
	// Version is told to the MCP client.
	Version string
	// Logger takes the SDK's reports; nil discards.
	Logger *slog.Logger
}

// New makes an MCP server. Run it on a transport of the SDK.
func New(o Options) *mcp.Server {
	s := mcp.NewServer(
		&mcp.Implementation{Name: "wrenn", Title: "Wrenn Sandbox", Version: o.Version},
		&mcp.ServerOptions{Instructions: instructions, Logger: o.Logger, Capabilities: &mcp.ServerCapabilities{}},
	)
	t := &tools{c: o.Client}
	t.addSandboxes(s)
	t.addCommands(s)
	t.addFiles(s)
	t.addSnapshots(s)
	return s
}

// HTTPOptions say how to serve MCP over HTTP.
type HTTPOptions struct {
	// BaseURL is the Wrenn server.
	BaseURL string
	// Version is told to the MCP client.
	Version string
	// Logger takes the SDK's reports; nil discards.
	Logger *slog.Logger
}

// Handler serves MCP as streamable HTTP, without sessions. Each request carries
// a key of the Wrenn server ("Authorization: Bearer" or X-API-Key) and can do
// what this key can: the handler has no key of its own to lend.
func Handler(o HTTPOptions) http.Handler {
	inner := mcp.NewStreamableHTTPHandler(func(r *http.Request) *mcp.Server {
		c, err := client.New(client.Options{BaseURL: o.BaseURL, APIKey: requestKey(r), UserAgent: "wrenn-mcp/" + o.Version})
		if err != nil {
			return nil // answered with 400
		}
		return New(Options{Client: c, Version: o.Version, Logger: o.Logger})
	}, &mcp.StreamableHTTPOptions{
		Stateless: true, Logger: o.Logger, PropagateRequestCancellation: true, MaxRequestBodyBytes: maxRequest,
	})
	return http.NewCrossOriginProtection().Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requestKey(r) == "" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="wrenn"`)
			http.Error(w, "send an API key of the Wrenn server as Authorization: Bearer KEY", http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
}

// maxRequest bounds one HTTP request: a file of maxWrite bytes in base64, and
// JSON around it.
const maxRequest = 2*maxWrite + 64<<10

func requestKey(r *http.Request) string {
	if scheme, key, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "bearer") {
		return strings.TrimSpace(key)
	}
	return r.Header.Get("X-API-Key")
}
