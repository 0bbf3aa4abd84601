package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
)

// pkcs11PIN is what kleidi pkcs11-pin made.
type pkcs11PIN struct {
	File    string `json:"sealedPINFile"`
	PINFile string `json:"pinFile,omitempty"`
	Bank    string `json:"bank"`
	PCRs    []int  `json:"pcrs"`
}

func (a *app) newPKCS11PIN() *cobra.Command {
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
			p, err := n.makeSealedPIN(cmd.Context(), out, func() (*seal.Secret, error) { return readPIN(cmd, n.mem, pinFile) })
			if err != nil {
				return requireRoot(fmt.Errorf("pkcs11-pin: %w", err))
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

func printSealedPIN(w io.Writer, p *pkcs11PIN) {
	fmt.Fprintf(w, "PIN sealed to this machine's TPM, of use to this machine alone, written to %s\n", p.File)
	fmt.Fprintf(w, "it unseals while PCR 7 (%s) is what it is now: seal it anew when Secure Boot's state or keys change\n", p.Bank)
	fmt.Fprintf(w, "next: set pkcs11.sealedPINFile: %s in place of pkcs11.pinFile, restart kleidi serve,\nand see with kleidi slot test that the token takes the PIN\n", p.File)
	if p.PINFile != "" {
		fmt.Fprintf(w, "then keep the PIN off this machine, and remove it here: shred -u %s\n", p.PINFile)
		fmt.Fprintf(w, "flash, snapshots, journals and backups may hold copies all the same: only another PIN on the token makes them worthless\n")
	}
}

// makeSealedPIN writes the file once it is proven that the PIN comes out of it. It
// asks for the PIN only where it would not be in vain.
func (n *node) makeSealedPIN(ctx context.Context, file string, readPIN func() (*seal.Secret, error)) (*pkcs11PIN, error) {
	file, err := filepath.Abs(file)
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(file); err == nil {
		return nil, fmt.Errorf("%s exists; name another file", file)
	}
	if err := n.ready(); err != nil {
		return nil, err
	}
	pcrs := []int{7}
	if err := n.gate.Holds(ctx, "unseal the PIN", pcrs, "keep the PIN in a file, with pkcs11.pinFile"); err != nil {
		return nil, needsTPM(err)
	}
	pin, err := readPIN()
	if err != nil {
		return nil, err
	}
	defer pin.Close()
	blob, err := n.gate.Device.SealCredential(ctx, n.gate.Owner, n.gate.Bank, pin)
	if err != nil {
		return nil, needsTPM(err)
	}
	if err := n.provePIN(ctx, blob, pin); err != nil {
		return nil, err
	}
	if err := writeNew(file, blob); err != nil {
		return nil, err
	}
	return &pkcs11PIN{File: file, Bank: n.cfg.TPM.Bank, PCRs: pcrs}, nil
}

func (n *node) provePIN(ctx context.Context, blob []byte, pin *seal.Secret) error {
	got, err := n.gate.Device.UnsealCredential(ctx, n.gate.Owner, n.mem, blob)
	if err != nil {
		return err
	}
	defer got.Close()
	if !got.Equal(pin) {
		return errors.New("the TPM unseals something else than what was sealed, nothing was written; see whether the TPM is faulty")
	}
	return nil
}

// sealedPIN is the user PIN where it is sealed to the TPM. The file is read anew each
// time, so replacing it is enough.
func (n *node) sealedPIN(ctx context.Context) (*seal.Secret, error) {
	path := n.cfg.PKCS11.SealedPINFile
	blob, err := readFile(path, tpm.MaxSealedCredential)
	if err != nil {
		return nil, seal.Errorf(seal.CauseCredentials, "make it with kleidi pkcs11-pin, or correct pkcs11.sealedPINFile", "pkcs11.sealedPINFile: %w", err)
	}
	pin, err := n.gate.Device.UnsealCredential(ctx, n.gate.Owner, n.mem, blob)
	if e, ok := errors.AsType[*seal.Error](needsTPM(err)); ok {
		return nil, seal.Errorf(e.Cause, e.Hint, "pkcs11.sealedPINFile: %s: %w", path, e.Err)
	}
	return pin, err
}

// needsTPM says what a machine without a TPM can do.
func needsTPM(err error) error {
	e, ok := errors.AsType[*seal.Error](err)
	if !ok || e.Cause != seal.CauseUnavailable {
		return err
	}
	return seal.Errorf(e.Cause, e.Hint+"; where there is no TPM, set pkcs11.pinFile instead", "a sealed PIN needs this machine's TPM: %w", e.Err)
}
