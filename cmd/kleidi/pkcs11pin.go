package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/slots"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

func newPKCS11PIN(a *app) *cobra.Command {
	var pinFile, out string
	cmd := &cobra.Command{
		Use:   "pkcs11-pin --pin-file FILE --out FILE",
		Short: "Seal the user PIN of a PKCS#11 token to this machine's TPM",
		Long: `Seal the user PIN of a PKCS#11 token to this machine's TPM, so that the PIN is not
readable on the disk. The sealed file is useless on another machine. The command does
not try the PIN on the token; kleidi slot test does. docs/pkcs11.md says how to go on.

The PIN unseals only while PCR 7 keeps its present value, which holds the state and the
keys of Secure Boot, and Secure Boot must be on. After a change of these, or after the
TPM was cleared, seal the PIN again: keep the PIN with the recovery identity.`,
		Example: `  kleidi pkcs11-pin --pin-file /etc/kleidi/pkcs11.pin --out /etc/kleidi/pkcs11.pin.sealed
  kleidi pkcs11-pin --pin-file - --out /etc/kleidi/pkcs11.pin.sealed`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			if pinFile == fromStdin {
				pinFile = ""
			}
			p, err := slots.SealPIN(cmd.Context(), n, out, func() (*seal.Secret, error) { return inputOf(cmd).PIN(cmd.Context(), n.Memory, pinFile) })
			if err != nil {
				return files.HintRoot(fmt.Errorf("pkcs11-pin: %w", err))
			}
			p.PINFile = pinFile
			return show(cmd, a, p, text.SealedPIN)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&pinFile, "pin-file", "", "file with the PIN on its first line, readable only by its owner; - asks for the PIN or reads standard input")
	flags.StringVar(&out, "out", "", "new file for the sealed PIN; name it in pkcs11.sealedPINFile")
	required(cmd, "pin-file", "out")
	fileFlags(cmd, "pin-file", "out")
	return cmd
}
