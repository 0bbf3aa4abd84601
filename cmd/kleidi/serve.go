package main

import (
	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/serve"
)

func newServe(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Serve KMS v2 to kube-apiserver",
		Long: `Serve KMS v2 to kube-apiserver. With a locked keyring kleidi keeps running: it answers
with the fault, keeps trying, and serves as soon as the keyring opens.

On SIGHUP it reads the keyring again. On SIGTERM it answers the calls in progress, and
ends.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.newServer()
			if err != nil {
				if !serve.Supervised() {
					return err
				}
				printError(cmd.ErrOrStderr(), err) // before the wait
				serve.HoldBack(cmd.Context(), err)
				return &exitError{code: 1}
			}
			s.Run(cmd.Context())
			return nil
		},
	}
}

func (a *app) newServer() (*serve.Server, error) {
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	return serve.New(cfg, logger(cfg))
}
