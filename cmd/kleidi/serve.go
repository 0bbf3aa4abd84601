package main

import (
	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/serve"
	"github.com/beezy-dev/kleidi/internal/text"
)

// newServe returns the verb serve. A locked keyring is no failure. The exit code is 1 only
// if serve can't be set up; under systemd it then prints the error and holds back, because
// systemd starts the unit again and again.
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
				return holdBack(cmd, err)
			}
			s.Run(cmd.Context())
			return nil
		},
	}
}

// holdBack returns the error of a service that can't be set up. Under systemd it waits
// before that, and prints the error before the wait.
func holdBack(cmd *cobra.Command, err error) error {
	if !serve.Supervised() {
		return err
	}
	text.Error(cmd.ErrOrStderr(), err)
	serve.HoldBack(cmd.Context(), err)
	return &exitError{code: 1}
}

func (a *app) newServer() (*serve.Server, error) {
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	return serve.New(cfg, logger(cfg))
}
