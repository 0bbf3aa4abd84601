package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/slots"
	"github.com/beezy-dev/kleidi/seal"
)

func newPKCS11PIN(a *app) *cobra.Command {
	var pinFile, out string
	cmd := &cobra.Command{
		Use:   "pkcs11-pin --pin-file FILE --out FILE",
		Short: "Seal the user PIN of a PKCS#11 token to this machine's TPM",
		Long: `Seal the user PIN of a PKCS#11 token to this machine's TPM, so that no PIN lies
readable on the disk. What is written is of no use to another machine. Nothing asks
the token for the PIN here: kleidi slot test does. docs/pkcs11.md goes on from there.

The PIN unseals only while PCR 7, the state and the keys of Secure Boot, is what it is
now, and Secure Boot must be on. After a change of these, or when the TPM was cleared,
seal it anew: keep the PIN where you keep the recovery identity.`,
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
			p, err := slots.SealPIN(cmd.Context(), n, out, func() (*seal.Secret, error) { return readPIN(cmd, n.Memory, pinFile) })
			if err != nil {
				return files.HintRoot(fmt.Errorf("pkcs11-pin: %w", err))
			}
			p.PINFile = pinFile
			return a.show(cmd.OutOrStdout(), p, func(w io.Writer) { printSealedPIN(w, p) })
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&pinFile, "pin-file", "", "file with the PIN on its first line, readable by its owner alone; - asks for it, or reads standard input")
	flags.StringVar(&out, "out", "", "new file for the sealed PIN, which pkcs11.sealedPINFile names")
	for _, name := range []string{"pin-file", "out"} {
		_ = cmd.MarkFlagRequired(name)
		_ = cmd.MarkFlagFilename(name)
	}
	return cmd
}

func printSealedPIN(w io.Writer, p *slots.SealedPIN) {
	fmt.Fprintf(w, "PIN sealed to this machine's TPM, of use to this machine alone, written to %s\n", p.File)
	fmt.Fprintf(w, "it unseals while PCR 7 (%s) is what it is now: seal it anew when Secure Boot's state or keys change\n", p.Bank)
	fmt.Fprintf(w, "next: set pkcs11.sealedPINFile: %s in place of pkcs11.pinFile, restart kleidi serve,\nand see with kleidi slot test that the token takes the PIN\n", p.File)
	if p.PINFile != "" {
		fmt.Fprintf(w, "then keep the PIN off this machine, and remove it here: shred -u %s\n", p.PINFile)
		fmt.Fprintf(w, "flash, snapshots, journals and backups may hold copies all the same: only another PIN on the token makes them worthless\n")
	}
}
