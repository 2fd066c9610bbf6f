package mcpserver

import (
	"context"
	"errors"
	"fmt"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"git.omukk.dev/wrenn/sandbox/client"
)

// tools holds the handlers.
type tools struct{ c *client.Client }

// Hints for MCP clients that ask people before they let a model call.
var (
	reads    = &mcp.ToolAnnotations{ReadOnlyHint: true, OpenWorldHint: new(bool)}
	adds     = &mcp.ToolAnnotations{DestructiveHint: new(bool), OpenWorldHint: new(bool)}
	destroys = &mcp.ToolAnnotations{DestructiveHint: yes(), OpenWorldHint: new(bool)}
	// runs is for code: in the sandbox it may do anything, and it reaches the
	// internet.
	runs = &mcp.ToolAnnotations{DestructiveHint: yes(), OpenWorldHint: yes()}
)

func yes() *bool { b := true; return &b }

// add registers a tool whose errors carry the remedy.
func add[In, Out any](s *mcp.Server, name string, hints *mcp.ToolAnnotations, description string,
	do func(context.Context, In) (Out, error)) {
	mcp.AddTool(s, &mcp.Tool{Name: name, Description: description, Annotations: hints},
		func(ctx context.Context, _ *mcp.CallToolRequest, in In) (*mcp.CallToolResult, Out, error) {
			out, err := do(ctx, in)
			if err != nil {
				var none Out
				return nil, none, withRemedy(err)
			}
			return nil, out, nil
		})
}

// withRemedy adds to an error what the model can do about it.
func withRemedy(err error) error {
	var own remedyError
	switch {
	case errors.As(err, &own):
		return err
	case client.IsNotFound(err):
		return fmt.Errorf("%w. See what there is with list_sandboxes, list_snapshots or list_files", err)
	case client.IsInvalidState(err):
		return fmt.Errorf("%w. See the state with get_sandbox; a paused sandbox comes back with resume_sandbox", err)
	case client.IsConflict(err):
		return fmt.Errorf("%w. Choose another name, or remove what has it first", err)
	case client.IsUnauthorized(err):
		return fmt.Errorf("%w. The person who set up this MCP server has to give it a valid WRENN_API_KEY", err)
	case client.IsHostUnavailable(err):
		return fmt.Errorf("%w. Try again in a moment, or free memory by pausing or destroying sandboxes", err)
	case client.IsUnreachable(err):
		return fmt.Errorf("no Wrenn server answers (%w). The person who set this up has to start it with: wrenn up, or correct WRENN_URL", err)
	}
	return err
}

// remedyError says itself what to do.
type remedyError struct{ text string }

func (e remedyError) Error() string { return e.text }

func refuse(format string, a ...any) error { return remedyError{fmt.Sprintf(format, a...)} }
