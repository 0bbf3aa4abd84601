package main

import (
	"fmt"
	"io"
	"net"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/verifierd"
	"github.com/beezy-dev/kleidi/seal"
)

func newVerifierInit(a *app) *cobra.Command {
	var s verifierd.Setup
	cmd := &cobra.Command{
		Use:   "init --cluster-id ID --name HOST",
		Short: "Make a verifier's certificate, signing key and configuration",
		Long: `Make a verifier's certificate, signing key and configuration, and print what goes into
the configuration of the nodes. Existing files stay as they are, and nothing is made
then. Keep a copy of the signing key where you keep the recovery identity: without it
no slot that demands its signature opens.`,
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
				printVerifier(w, r)
				fmt.Fprintf(w, "\nthen register every node:\n\n  kleidi verifier register NODE --ek sha256:… --boot-policy FILE%s\n", configFlag(c.File()))
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&s.Dir, "dir", filepath.Dir(verifierd.DefaultPath), "folder for all of it")
	flags.StringVar(&s.Cluster, "cluster-id", "", "the cluster, as kleidi status on a node shows it")
	flags.StringVar(&s.Name, "name", "", "name or IP address by which nodes reach the verifier")
	flags.StringVar(&s.Listen, "listen", "0.0.0.0:9781", "address to listen on")
	_ = cmd.MarkFlagRequired("cluster-id")
	_ = cmd.MarkFlagRequired("name")
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
endorsement key, and the boot policy that its evidence is judged by. Bring digest and
boot policy from the node yourself, by a way that you trust: they say which TPM it is,
and how it may boot. Have the verifier
read it afterwards: systemctl reload kleidi-verifier, or SIGHUP.`,
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
	cmd.Flags().StringVar(&n.EK, "ek", "", "digest of the endorsement key, as kleidi keyring show on the node prints it")
	cmd.Flags().StringVar(&n.BootPolicy, "boot-policy", "", "what kleidi bootpolicy record wrote on the node")
	cmd.Flags().BoolVar(&replace, "replace", false, "replace what is registered of that node")
	_ = cmd.MarkFlagRequired("ek")
	_ = cmd.MarkFlagRequired("boot-policy")
	return cmd
}
