package main

import (
	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/serve"
)

func newServe(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Serve KMS v2 to kube-apiserver",
		Long: `Serve KMS v2 to kube-apiserver. A locked keyring is no reason to stop: kleidi answers
with what is wrong, tries again, and serves as soon as the keyring opens.

SIGHUP has it read the keyring anew; SIGTERM ends it once calls in progress are
answered.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			s, err := serve.New(cfg, logger(cfg))
			if err != nil {
				return err
			}
			s.Run(cmd.Context())
			return nil
		},
	}
}
