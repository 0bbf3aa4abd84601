package main

import (
	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/internal/verifierd"
)

// newVerifier returns the verb verifier, which runs on a machine that is no node, and so
// reads a configuration of its own.
func newVerifier(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verifier",
		Short: "Run the verifier: check nodes' boots from another machine, and sign for their TPMs",
		Long: `Run the verifier of the remote gate, on a machine that is not a node of the cluster. If
a node's configuration names a verifier, the node's TPM unseals only with the
verifier's signature. The verifier signs only after it has verified fresh evidence of
that TPM and its boot. docs/remote-attestation.md describes it.

The verifier has a separate configuration, see kleidi verifier init
(default ` + verifierd.DefaultPath + `). On SIGHUP it reads the configuration, the keys and the
boot policies again; SIGTERM ends it.`,
		Args: noVerb,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.newVerifierService()
			if err != nil {
				return holdBack(cmd, err)
			}
			if err := s.Run(cmd.Context()); err != nil { // its address can't be had
				return holdBack(cmd, err)
			}
			return nil
		},
	}
	cmd.AddCommand(newVerifierInit(a), newVerifierRegister(a), newVerifierShow(a))
	return cmd
}

func (a *app) newVerifierService() (*verifierd.Service, error) {
	c, err := a.verifierConfig()
	if err != nil {
		return nil, err
	}
	s, err := verifierd.New(c, logger(&config.Config{Log: c.Log}))
	if err != nil {
		return nil, files.HintRoot(err)
	}
	return s, nil
}

func newVerifierShow(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Check the verifier's configuration, and show the settings for the nodes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.verifierConfig()
			if err != nil {
				return err
			}
			if _, err := c.Verifier(); err != nil {
				return files.HintRoot(err)
			}
			r, err := c.Describe("")
			if err != nil {
				return files.HintRoot(err)
			}
			return show(cmd, a, r, text.Verifier)
		},
	}
}

// verifierConfig reads the configuration that the flags name.
func (a *app) verifierConfig() (*verifierd.Config, error) {
	path := a.configPath
	if path == "" {
		path = verifierd.DefaultPath
	}
	c, err := verifierd.Load(path)
	if err == nil && a.logLevel != "" {
		err = c.Log.Level.UnmarshalText([]byte(a.logLevel))
	}
	return c, err
}
