package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/internal/localca"
)

const caLong = `Make the certificate authority that "wrenn up --tls-listen" signs with where it
has no certificate of yours, or show the one that is there.

It can sign for the given domain alone. Clients must trust its certificate, for
example by
  NODE_EXTRA_CA_CERTS=<file>   programs that run on Node.js
  SSL_CERT_FILE=<file>         Python, curl, Go (in place of the system's own)
Its key stays in the state directory.`

func newCACmd() *cobra.Command {
	var dir, domain string
	var show bool
	cmd := &cobra.Command{
		Use: "ca", Short: "Make or show the local certificate authority for TLS",
		Long: caLong, Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !domainRE.MatchString(domain) {
				return usagef("--domain %q is no domain name in lower case, without a port", domain)
			}
			abs, err := filepath.Abs(dir)
			if err != nil {
				return fmt.Errorf("--dir: %w", err)
			}
			a, err := localca.Open(filepath.Join(abs, "ca"), domain, time.Now)
			if err != nil {
				return err
			}
			if !show {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), a.Path)
				return err
			}
			b, err := os.ReadFile(a.Path)
			if err != nil {
				return fmt.Errorf("read the certificate: %w", err)
			}
			_, err = cmd.OutOrStdout().Write(b)
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "dir", stateDir(), "state directory")
	cmd.Flags().StringVar(&domain, "domain", "", "domain it is to sign for (as given to wrenn up)")
	cmd.Flags().BoolVar(&show, "pem", false, "print the certificate instead of the name of its file")
	return cmd
}
