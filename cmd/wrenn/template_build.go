package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"git.omukk.dev/wrenn/sandbox/internal/template"
)

func newTemplateBuildCmd() *cobra.Command {
	var dir string
	var verbose bool
	cmd := &cobra.Command{
		Use: "build", Short: "Build the base template if it is missing or out of date",
		Long: "Build the base template on this machine. `wrenn up` does the same at its start; a running server takes the new base at its next start.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			abs, err := filepath.Abs(dir)
			if err != nil {
				return err
			}
			r, err := buildTemplate(cmd.Context(), abs, newLogger(upOptions{verbose: verbose}), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "base %s (kernel %s)\n", r.Digest[:12], r.KernelVersion)
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "dir", stateDir(), "state directory")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "log more")
	return cmd
}

// buildTemplate makes the base template, or finds it.
func buildTemplate(ctx context.Context, dir string, log *slog.Logger, w io.Writer) (template.Result, error) {
	envd, err := findEnvd()
	if err != nil {
		return template.Result{}, err
	}
	progress, done := progressOn(w)
	defer done()
	o := templateOptions(dir, envd)
	o.Progress, o.Logger = progress, log
	r, err := template.Build(ctx, o)
	if err != nil {
		return r, fmt.Errorf("build the base template: %w", err)
	}
	return r, nil
}

func templateOptions(dir, envd string) template.Options {
	return template.Options{
		Dir: filepath.Join(cacheDir(dir), "templates", "base"), Cache: filepath.Join(cacheDir(dir), "cache"), EnvdPath: envd,
	}
}

// pruneTemplates frees what earlier builds left. A cache that several state
// directories share is left alone: another server may boot from them.
func pruneTemplates(ctx context.Context, dir string, log *slog.Logger) {
	envd, err := findEnvd()
	if err != nil || os.Getenv("WRENN_CACHE") != "" {
		return
	}
	freed, err := template.Prune(ctx, templateOptions(dir, envd))
	if err != nil {
		log.Warn("old templates stay", "err", err)
	} else if freed > 0 {
		log.Info("removed old templates", "bytes", freed)
	}
}

// cacheDir is where templates are built: the state directory, or what
// WRENN_CACHE names so that several state directories share one.
func cacheDir(dir string) string { return cmp.Or(os.Getenv("WRENN_CACHE"), dir) }

// kvmVerdict is where what a boot found out about KVM is kept. It is a fact of
// the host, so state directories that share a cache share it: a KVM that hangs
// costs the full limit to find out.
func kvmVerdict(dir string) string { return filepath.Join(cacheDir(dir), "kvm-verdict.json") }

// findEnvd finds the guest agent beside this program.
func findEnvd() (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	path := filepath.Join(filepath.Dir(exe), "envd")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("the guest agent is missing: no %s; `make build` puts it there", path)
	}
	return path, nil
}

// progressOn shows steps as bars on a terminal, and as lines elsewhere.
func progressOn(w io.Writer) (show func(step string, done, total int64), end func()) {
	f, ok := w.(*os.File)
	var last string
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return func(step string, _, _ int64) {
			if step != last {
				fmt.Fprintf(w, "template: %s\n", step)
				last = step
			}
		}, func() {}
	}
	var bar *progressbar.ProgressBar
	end = func() {
		if bar != nil {
			bar.Finish()
			fmt.Fprintln(w)
			bar = nil
		}
	}
	return func(step string, done, total int64) {
		if step != last {
			end()
			last = step
			if total <= 0 {
				total = -1
			}
			bar = progressbar.NewOptions64(total, progressbar.OptionSetWriter(w), progressbar.OptionSetDescription(step), progressbar.OptionSetWidth(30))
		}
		bar.Set64(done)
	}, end
}
