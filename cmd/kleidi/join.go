package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/members"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

func newJoin(a *app) *cobra.Command {
	var name, verifier, trust, file string
	cmd := &cobra.Command{
		Use:   "join [ADDRESS] --node NAME --trust CLUSTER/KEYID/REVISION",
		Short: "Make this machine a node of a cluster that has kleidi",
		Long: `Make this machine a node of a cluster that has kleidi. kleidi node approve, on a
running node, prints the command.

The machine receives the KEK only after it has proven its TPM and its boot. Before it
saves anything, it seals the KEK to its own TPM and opens it once. If the command
breaks off at any step, run it again. It never replaces the keyring of another cluster.

A machine without a TPM can prove nothing. It joins with --keyring and a copy of the
keyring, which the configured token, server or KMS plugin opens.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o, err := source(args, verifier, file)
			if err != nil {
				return err
			}
			if o.Trust, err = keyring.ParseTrust(trust); err != nil {
				return fmt.Errorf("--trust: %w, as kleidi node approve prints it", err)
			}
			cfg, err := a.config(func(c *config.Config) error { return sameNode(c, name) })
			if err != nil {
				return err
			}
			n, err := node.New(cfg, logger(cfg), nil)
			if err != nil {
				return err
			}
			defer n.Close()
			steps := 0
			o.Progress = func(step string) {
				steps++
				fmt.Fprintf(cmd.ErrOrStderr(), "%d. %s\n", steps, step)
			}
			r, err := members.Join(cmd.Context(), n, o)
			if err != nil {
				return files.HintRoot(err)
			}
			return show(cmd, a, r, text.Joined)
		},
	}
	cmd.Flags().StringVar(&name, "node", "", "this machine's name in the keyring")
	cmd.Flags().StringVar(&verifier, "verifier", "", "digest of the certificate of the node that gives the KEK")
	cmd.Flags().StringVar(&trust, "trust", "", "the keyring to trust: cluster ID, key ID and revision")
	cmd.Flags().StringVar(&file, "keyring", "", "on a machine without a TPM: a copy of the keyring")
	_ = cmd.MarkFlagFilename("keyring")
	required(cmd, "node", "trust")
	return cmd
}

// source returns the source of the keyring: another node, or a file.
func source(args []string, verifier, file string) (o members.JoinOptions, err error) {
	switch {
	case file == "" && len(args) == 1 && verifier != "":
		o.Address, o.Verifier = args[0], verifier
	case file != "" && len(args) == 0 && verifier == "":
		o.Keyring, err = files.Read(file, keyring.MaxSize)
		if err != nil {
			err = fmt.Errorf("--keyring: %w", err)
		}
	default:
		err = errors.New("name the address and --verifier, as kleidi node approve prints them, or --keyring alone on a machine without a TPM")
	}
	return o, err
}

// sameNode refuses a name under which serve would later find no slot: serve looks for the
// slots of the node in the configuration, or of the host name.
func sameNode(c *config.Config, name string) error {
	if c.Node == "" {
		if host, err := os.Hostname(); err != nil || host != name {
			return seal.Errorf("", "set node: "+name+" in the configuration, so that kleidi serve uses it", "--node %s: the host name is %s", name, host)
		}
	}
	if c.Node != "" && c.Node != name {
		return seal.Errorf("", "use the same name in both", "--node %s: the configuration says node: %s", name, c.Node)
	}
	return nil
}
