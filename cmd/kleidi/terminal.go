package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/seal"
)

// terminal is the person at the terminal. It implements prompter.
type terminal struct {
	cmd  *cobra.Command
	read func(prompt string) ([]byte, error)
}

func newTerminal(cmd *cobra.Command) *terminal { return &terminal{cmd, lines(cmd)} }

// ShowIdentity implements prompter.
func (t *terminal) ShowIdentity(identity *seal.Secret) error {
	out := t.cmd.OutOrStdout()
	if r, ok := out.(*results); ok && isRegular(r.file) {
		return seal.Errorf("", "run kleidi init at a terminal, or give --recovery-recipient", "standard output is a file, and the recovery identity must not lie on this machine; nothing was made")
	}
	fmt.Fprint(out, "\nRecovery identity. It is shown once. Keep it off this machine: it opens the keyring\nwhen the TPM does not, and so it does for anyone who finds it.\n\n  ")
	identity.With(func(b []byte) { _, _ = out.Write(bytes.TrimSpace(b)) })
	fmt.Fprint(out, "\n\n")
	if r, ok := out.(*results); ok && r.err != nil {
		return seal.Errorf("", "run kleidi init at a terminal, or give --recovery-recipient", "the recovery identity could not be shown, so nothing was made")
	}
	return nil
}

// AskIdentity implements prompter.
func (t *terminal) AskIdentity() ([]byte, error) {
	return t.read("give it back, to show that you kept it (not shown): ")
}

// Tell implements prompter.
func (t *terminal) Tell(message string) { fmt.Fprintln(t.cmd.ErrOrStderr(), message) }

func isRegular(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}

// lines returns a function that reads secrets line by line: hidden at a terminal,
// otherwise from standard input.
func lines(cmd *cobra.Command) func(prompt string) ([]byte, error) {
	if f, ok := cmd.InOrStdin().(*os.File); ok && isTerminal(f) {
		return func(prompt string) ([]byte, error) { return promptSecret(cmd, prompt) }
	}
	in := cmd.InOrStdin()
	return func(string) ([]byte, error) { return readLine(in) }
}

// readLine reads byte by byte, so that no buffer keeps later bytes.
func readLine(r io.Reader) ([]byte, error) {
	b := make([]byte, 0, maxIdentity)
	var c [1]byte
	for len(b) < maxIdentity {
		if _, err := io.ReadFull(r, c[:]); err != nil {
			if len(b) > 0 && errors.Is(err, io.EOF) {
				return b, nil
			}
			return nil, err
		}
		if c[0] == '\n' {
			return b, nil
		}
		b = append(b, c[0])
	}
	return nil, fmt.Errorf("more than %d bytes", maxIdentity)
}

// fromStdin stands for standard input in place of a file name.
const fromStdin = "-"

// readPIN reads a PIN from a file, or a line from standard input. At a terminal it asks
// twice, because a wrong PIN would cost a try on the token.
func readPIN(cmd *cobra.Command, mem seal.Memory, file string) (*seal.Secret, error) {
	if file != "" {
		return hsm.ReadPIN(mem, file)
	}
	read := lines(cmd)
	b, err := read("user PIN of the token (not shown): ")
	b = bytes.TrimSuffix(b, []byte("\r"))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read the PIN: %w", err)
	}
	if len(b) == 0 {
		return nil, seal.Errorf("", "type it, pipe it in, or name --pin-file", "no PIN was given")
	}
	pin, err := mem.Take(b)
	if err != nil {
		return nil, err
	}
	if in, ok := cmd.InOrStdin().(*os.File); !ok || !isTerminal(in) {
		return pin, nil
	}
	if err := sameAgain(mem, read, pin); err != nil {
		_ = pin.Close()
		return nil, err
	}
	return pin, nil
}

func sameAgain(mem seal.Memory, read func(prompt string) ([]byte, error), pin *seal.Secret) error {
	b, err := read("the same PIN again: ")
	if err != nil {
		return err
	}
	if len(b) > 0 {
		again, err := mem.Take(b)
		if err != nil {
			return err
		}
		defer again.Close()
		if again.Equal(pin) {
			return nil
		}
	}
	return seal.Errorf("", "run the command again", "the two PINs differ, nothing was written")
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
	b, err := readBounded(f)
	if errors.Is(err, errNoIdentity) {
		return nil, seal.Errorf("", "name the file with the recovery identity (AGE-SECRET-KEY-…)", "--identity-file: %s is empty", file)
	}
	if err != nil {
		return nil, fmt.Errorf("--identity-file: %w", err)
	}
	return b, nil
}

var errNoIdentity = seal.Errorf("", "type it, pipe it in, or name --identity-file", "no recovery identity was given")

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

// readHidden reads a line that the terminal does not show. An interrupt ends it, and
// restores the terminal.
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
		return nil, errNoIdentity
	}
	return b[:n], nil
}

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// onTerminal reports whether standard output is a terminal, where a person watches.
func onTerminal() bool { return term.IsTerminal(syscall.Stdout) }
