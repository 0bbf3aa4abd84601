package main

import (
	"fmt"
	"io"
	"net"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/internal/verifierd"
	"github.com/beezy-dev/kleidi/seal"
)

func newVerifierInit(a *app) *cobra.Command {
	var s verifierd.Setup
	cmd := &cobra.Command{
		Use:   "init --cluster-id ID --name HOST",
		Short: "Make a verifier's certificate, signing key and configuration",
		Long: `Make a verifier's certificate, signing key and configuration, and print the settings
for the configuration of the nodes. If a file already exists, the command changes and
makes nothing. Keep a copy of the signing key with the recovery identity: without the
key, no slot that demands its signature opens.`,
		Example: "  kleidi verifier init --cluster-id 5f0c… --name verifier.example.com",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := s.Make()
			if err != nil {
				return files.HintRoot(fmt.Errorf("verifier init: %w", err))
			}
			_, port, _ := net.SplitHostPort(c.Listen)
			r, err := c.Describe(net.JoinHostPort(s.Name, port))
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), r, func(w io.Writer) {
				text.Verifier(w, r)
				fmt.Fprintf(w, "\nthen register every node:\n\n  kleidi verifier register NODE --ek sha256:… --boot-policy FILE%s\n", configFlag(c.File()))
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&s.Dir, "dir", filepath.Dir(verifierd.DefaultPath), "folder for these files")
	flags.StringVar(&s.Cluster, "cluster-id", "", "the cluster, as kleidi status on a node shows it")
	flags.StringVar(&s.Name, "name", "", "name or IP address by which nodes reach the verifier")
	flags.StringVar(&s.Listen, "listen", "0.0.0.0:9781", "address to listen on")
	required(cmd, "cluster-id", "name")
	return cmd
}

// configFlag names a configuration that is not at its default path.
func configFlag(path string) string {
	if path == verifierd.DefaultPath {
		return ""
	}
	return " --config " + seal.Quote(path)
}

func newVerifierRegister(a *app) *cobra.Command {
	var n verifierd.Node
	var replace bool
	cmd := &cobra.Command{
		Use:   "register NAME --ek sha256:… --boot-policy FILE",
		Short: "Add a node to the verifier's configuration",
		Long: `Add a node to the verifier's configuration: its name, the digest of its TPM's
endorsement key, and the boot policy for its evidence. Bring the digest and the boot
policy from the node on a path that you trust: they decide which TPM is accepted, and
how it may boot. Afterwards reload the verifier: systemctl reload kleidi-verifier, or
SIGHUP.`,
		Example: "  kleidi verifier register cp-1 --ek sha256:4c1f… --boot-policy /etc/kleidi/verifier/cp-1.yaml",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			n.Name = args[0]
			c, err := a.verifierConfig()
			if err == nil {
				err = c.Register(n, replace)
			}
			if err != nil {
				return files.HintRoot(fmt.Errorf("register: %w", err))
			}
			return a.show(cmd.OutOrStdout(), n, func(w io.Writer) {
				fmt.Fprintf(w, "node %s with EK %.23s… registered in %s; reload the verifier: systemctl reload kleidi-verifier\n", n.Name, n.EK, c.File())
			})
		},
	}
	cmd.Flags().StringVar(&n.EK, "ek", "", "digest of the endorsement key, from kleidi keyring show on the node")
	cmd.Flags().StringVar(&n.BootPolicy, "boot-policy", "", "the file that kleidi bootpolicy record wrote on the node")
	cmd.Flags().BoolVar(&replace, "replace", false, "replace the node's registration")
	required(cmd, "ek", "boot-policy")
	return cmd
}
