package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/verifierd"
)

func newVerifier(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verifier",
		Short: "Verify nodes from another machine, and give their TPMs the signature that they demand",
		Long: `Run the verifier of the remote gate, on a machine that is not a node of the cluster. If
a node's configuration names a verifier, the node's TPM unseals only with the
verifier's signature. The verifier signs only after it has verified fresh evidence of
that TPM and its boot. docs/remote-attestation.md describes it.

The verifier has a separate configuration, see kleidi verifier init
(default ` + verifierd.DefaultPath + `). On SIGHUP it reads the configuration, the keys and the
boot policies again; SIGTERM ends it.`,
		Args: noVerb,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.verifierConfig()
			if err != nil {
				return err
			}
			s, err := verifierd.New(c, logger(&config.Config{Log: c.Log}))
			if err != nil {
				return files.HintRoot(err)
			}
			return s.Run(cmd.Context())
		},
	}
	cmd.AddCommand(newVerifierInit(a), newVerifierRegister(a), newVerifierShow(a))
	return cmd
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
			return a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printVerifier(w, r) })
		},
	}
}

func printVerifier(w io.Writer, r *verifierd.Report) {
	row(w, "configuration", r.Config)
	row(w, "cluster ID", r.ClusterID)
	row(w, "listens on", r.Listen)
	row(w, "certificate", r.Certificate)
	for _, n := range r.Nodes {
		row(w, "node", fmt.Sprintf("%s  EK %s  %s", n.Name, n.EK, n.BootPolicy))
	}
	fmt.Fprintf(w, "\non every node, write this to %s:\n\n%s\nand into its configuration:\n\n%s", verifierd.PublicKeyPath, r.PublicKey, r.NodeConfiguration)
}
