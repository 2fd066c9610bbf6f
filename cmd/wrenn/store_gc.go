package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/client"
	"git.omukk.dev/wrenn/sandbox/internal/engine"
)

const storeGCLong = `Tell what nothing needs any more, and how many bytes that is; with --yes free it.

Where a server has the state directory, it is asked at WRENN_URL with the directory's
own key, for it alone knows what is under way; it also does this by itself after
deletions. Without a server the directory is read and cleaned as it is.`

func newStoreGCCmd(dir *string) *cobra.Command {
	var yes, dry bool
	cmd := &cobra.Command{
		Use: "gc", Short: "Free blocks that nothing needs", Long: storeGCLong,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if yes && dry {
				return usagef("--yes and --dry-run exclude each other")
			}
			g, err := collectGarbage(cmd.Context(), *dir, !yes)
			if err != nil {
				return err
			}
			return printGarbage(outputOf(cmd), g)
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "free it, instead of telling what would be")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only tell, which is what happens without --yes")
	return cmd
}

// collectGarbage asks the server that has the directory, or else does it here,
// keeping servers out meanwhile.
func collectGarbage(ctx context.Context, dir string, dryRun bool) (*client.Garbage, error) {
	store, err := openStore(dir, dryRun)
	if err != nil {
		return nil, err
	}
	defer store.Close()
	lock, err := lockState(dir)
	if errors.Is(err, errStateTaken) {
		return askForGarbage(ctx, dir, dryRun)
	}
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	roots, err := engine.Roots(dir)
	if err != nil {
		return nil, err
	}
	r, err := store.GC(ctx, roots, dryRun)
	if err != nil {
		return nil, err
	}
	g := &client.Garbage{DryRun: dryRun, Bytes: r.Bytes, Items: []client.GarbageItem{}}
	for _, it := range r.Items {
		g.Items = append(g.Items, client.GarbageItem{Kind: string(it.Kind), ID: it.ID.String(), Bytes: it.Bytes})
	}
	return g, nil
}

// askForGarbage asks with the key of the directory: a server that takes it is
// the one that has the directory.
func askForGarbage(ctx context.Context, dir string, dryRun bool) (*client.Garbage, error) {
	key, err := keyIn(filepath.Join(dir, "api-key"))
	if err != nil {
		return nil, err
	}
	c, err := client.New(client.Options{BaseURL: serverURL(), APIKey: key, UserAgent: "wrenn-cli/" + version()})
	if err != nil {
		return nil, usagef("%w (from WRENN_URL)", err)
	}
	g, err := c.CollectGarbage(ctx, dryRun)
	if client.IsUnauthorized(err) {
		return nil, fmt.Errorf("the server at %s does not take the key of %s: WRENN_URL must name the server that has this directory: %w", serverURL(), dir, err)
	}
	return g, err
}

func printGarbage(o output, g *client.Garbage) error {
	if o.json {
		return o.printJSON(g)
	}
	if len(g.Items) > 0 {
		rows := make([][]string, 0, len(g.Items))
		for _, it := range g.Items {
			rows = append(rows, []string{it.Kind, it.ID, mebibytes(it.Bytes)})
		}
		if err := o.table([]string{"KIND", "ID", "SIZE"}, rows); err != nil {
			return err
		}
	}
	what := "freed"
	switch {
	case g.DryRun && len(g.Items) > 0:
		what = "would be freed; --yes frees it"
	case g.DryRun:
		what = "would be freed"
	}
	_, err := fmt.Fprintf(o.w, "%s in %d things %s\n", mebibytes(g.Bytes), len(g.Items), what)
	return err
}
