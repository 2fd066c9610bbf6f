package main

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/client"
)

// completeLimit bounds how long a person waits for a completion.
const completeLimit = 2 * time.Second

// completeSandboxes offers the IDs of sandboxes in a state; "" means any.
func completeSandboxes(status string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		var opts client.ListSandboxesOptions
		if status != "" {
			opts.Status = []string{status}
		}
		return complete(cmd, given, func(ctx context.Context, c *client.Client) ([]cobra.Completion, error) {
			page, err := c.ListSandboxes(ctx, opts)
			if err != nil {
				return nil, err
			}
			var out []cobra.Completion
			for _, sb := range page.Sandboxes {
				out = append(out, cobra.CompletionWithDesc(sb.ID, printable(sb.Template+", "+sb.Status)))
			}
			return out, nil
		})
	}
}

// completeTemplates offers the names of templates of a type; "" means any.
func completeTemplates(kind string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return complete(cmd, given, func(ctx context.Context, c *client.Client) ([]cobra.Completion, error) {
			page, err := c.ListSnapshots(ctx, client.ListSnapshotsOptions{Type: kind})
			if err != nil {
				return nil, err
			}
			var out []cobra.Completion
			for _, s := range page.Snapshots {
				out = append(out, cobra.CompletionWithDesc(s.Name, printable(s.Type)))
			}
			return out, nil
		})
	}
}

// complete offers what list finds without what the line already has. A server
// that cannot be asked offers nothing: an error would garble the line.
func complete(cmd *cobra.Command, given []string,
	list func(context.Context, *client.Client) ([]cobra.Completion, error)) ([]cobra.Completion, cobra.ShellCompDirective) {
	const no = cobra.ShellCompDirectiveNoFileComp
	c, err := connect()
	if err != nil {
		return nil, no
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completeLimit)
	defer cancel()
	out, err := list(ctx, c)
	if err != nil {
		return nil, no
	}
	return slices.DeleteFunc(out, func(s cobra.Completion) bool {
		return slices.ContainsFunc(given, func(g string) bool { return s == g || len(s) > len(g) && s[:len(g)+1] == g+"\t" })
	}), no
}

// completeFirst offers f's completions for the first argument only.
func completeFirst(f cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, to string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(given) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return f(cmd, given, to)
	}
}
