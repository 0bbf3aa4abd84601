package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/slots"
	"github.com/beezy-dev/kleidi/internal/text"
)

func newVaultKey(a *app) *cobra.Command {
	var out, csr, name string
	cmd := &cobra.Command{
		Use:   "vault-key --out FILE --csr FILE",
		Short: "Make a key in this machine's TPM for logging in to Vault",
		Long: `Make a client key in this machine's TPM, for Vault's and OpenBao's certificate
authentication, and a certificate request for the CA that issues nodes' certificates.
The key never leaves the TPM, and the key file is useless on another machine. So the
disk holds no credential. docs/vault.md says how to go on.

The key signs only while PCR 7 keeps its present value, which holds the state and the
keys of Secure Boot, and Secure Boot must be on. After a change of these, or after the
TPM was cleared, make a new key.`,
		Example: `  kleidi vault-key --out /etc/kleidi/vault/node.tpmkey --csr node.csr`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			k := &slots.VaultKey{Key: out, Request: csr, Name: name, Bank: n.Config.TPM.Bank}
			if k.Name == "" {
				k.Name = n.Config.Node
			}
			if err := slots.MakeVaultKey(cmd.Context(), n, k); err != nil {
				return files.HintRoot(fmt.Errorf("vault-key: %w", err))
			}
			return show(cmd, a, k, text.VaultKey)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&out, "out", "", "new file for the key; name it in vault.auth.tpmKeyFile")
	flags.StringVar(&csr, "csr", "", "new file for the certificate request, in PEM")
	flags.StringVar(&name, "name", "", "common name in the request (default: this node's name)")
	required(cmd, "out", "csr")
	fileFlags(cmd, "out", "csr")
	return cmd
}
