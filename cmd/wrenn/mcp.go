package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os/signal"
	"syscall"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/mcpserver"
)

func newMCPCmd() *cobra.Command {
	var listen string
	cmd := &cobra.Command{
		Use:   "mcp",
		Short: "Offer sandboxes to AI agents as tools (Model Context Protocol)",
		Long: `Offer sandboxes to AI agents as tools: create, run commands and Python, files,
pause, resume, snapshot, destroy.

Without --listen it speaks the Model Context Protocol on standard input and
output: put it into an agent's configuration as a command. It talks to the
server of WRENN_URL with WRENN_API_KEY, like all commands.

With --listen it serves streamable HTTP at /mcp. Each request must then carry an
API key of the server (Authorization: Bearer KEY); this process lends none.

docs/mcp.md has the configuration of common agents.`,
		Example: `  wrenn mcp
  wrenn mcp --listen 127.0.0.1:8765`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
			if listen != "" {
				return serveMCP(ctx, cmd, listen, log)
			}
			c, err := connect()
			if err != nil {
				return err
			}
			server := mcpserver.New(mcpserver.Options{Client: c, Version: version(), Logger: log})
			err = server.Run(ctx, &mcp.StdioTransport{})
			if ctx.Err() != nil {
				return nil // told to end
			}
			return err
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "serve streamable HTTP at this address instead, such as 127.0.0.1:8765")
	return cmd
}

// serveMCP serves over HTTP until ctx ends, and then gives calls under way a
// moment.
func serveMCP(ctx context.Context, cmd *cobra.Command, listen string, log *slog.Logger) error {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return usagef("--listen %s: %w", listen, err)
	}
	mux := http.NewServeMux()
	mux.Handle("/mcp", mcpserver.Handler(mcpserver.HTTPOptions{BaseURL: serverURL(), Version: version(), Logger: log}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	fmt.Fprintf(cmd.OutOrStdout(), "serves MCP on http://%s/mcp\n", l.Addr())
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err = srv.Shutdown(sctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = srv.Close()
	}
	<-ended
	return err
}
