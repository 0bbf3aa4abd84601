package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
)

func (a *app) newRecover() *cobra.Command {
	var file, trust string
	var withoutVerifier, breaks bool
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Open a locked keyring with the recovery identity, seal anew and rotate",
		Long: `Open the keyring with the recovery identity, seal a fresh KEK to this machine's
present boot state and make it current. All earlier KEKs are retired and still
decrypt, so nothing is lost. Slots of the earlier boot state are revoked.

The identity is asked for, or read from standard input or from --identity-file.`,
		Example: `  kleidi recover
  kleidi recover --identity-file /media/usb/kleidi-recovery.txt`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			identity, err := readIdentity(cmd, file)
			if err != nil {
				return err
			}
			defer clear(identity)
			req := admin.RecoverRequest{Identity: identity, TrustKeyID: seal.KeyID(trust), WithoutVerifier: withoutVerifier, BreakTwoOfTwo: breaks}
			s, err := operate(cmd.Context(), a, admin.Recover, req, (*node).recover)
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().StringVar(&file, "identity-file", "", "file that holds the recovery identity (AGE-SECRET-KEY-…)")
	cmd.Flags().BoolVar(&breaks, "break-two-of-two", false, "go on although one wrapper, or the recovery identity, alone opens the KEK then")
	cmd.Flags().BoolVar(&withoutVerifier, "without-verifier", false, "demand no verifier, where it is gone for good")
	cmd.Flags().StringVar(&trust, "trust-key-id", "", "trust the keyring with this current key ID although the anchor does not vouch for it")
	_ = cmd.MarkFlagFilename("identity-file")
	return cmd
}

// maxIdentity bounds an identity file, in bytes.
const maxIdentity = 16 << 10

// readIdentity never takes the identity from the command line, where ps shows it.
func readIdentity(cmd *cobra.Command, file string) ([]byte, error) {
	if file == "" {
		return promptSecret(cmd, "recovery identity (AGE-SECRET-KEY-…, not shown): ")
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("--identity-file: %w", err)
	}
	defer f.Close()
	return readBounded(f)
}

// promptSecret reads a line without showing it; without a terminal, all of
// standard input.
func promptSecret(cmd *cobra.Command, prompt string) ([]byte, error) {
	in, ok := cmd.InOrStdin().(*os.File)
	if !ok || !isTerminal(in) {
		return readBounded(cmd.InOrStdin())
	}
	fmt.Fprint(cmd.ErrOrStderr(), prompt)
	defer fmt.Fprintln(cmd.ErrOrStderr())
	return readHidden(cmd.Context(), in)
}

// readHidden reads a line that the terminal does not show. An interrupt ends it,
// and leaves the terminal as it was.
func readHidden(ctx context.Context, in *os.File) ([]byte, error) {
	before, err := term.GetState(int(in.Fd()))
	if err != nil {
		return nil, err
	}
	type line struct {
		text []byte
		err  error
	}
	read := make(chan line, 1)
	go func() {
		b, err := term.ReadPassword(int(in.Fd()))
		read <- line{b, err}
	}()
	select {
	case l := <-read:
		return l.text, l.err
	case <-ctx.Done():
		return nil, errors.Join(errors.New("interrupted"), term.Restore(int(in.Fd()), before))
	}
}

// readBounded reads into one buffer, so that no copies are left behind.
func readBounded(r io.Reader) ([]byte, error) {
	b := make([]byte, maxIdentity)
	n, err := io.ReadFull(r, b)
	if err == nil {
		clear(b)
		return nil, fmt.Errorf("recovery identity: more than %d bytes", maxIdentity)
	}
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		clear(b)
		return nil, fmt.Errorf("recovery identity: %w", err)
	}
	if len(bytes.TrimSpace(b[:n])) == 0 {
		return nil, errors.New("no recovery identity was given; type it, pipe it in, or name --identity-file")
	}
	return b[:n], nil
}

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }
