package main

import (
	"bytes"
	"fmt"
	"os"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/beezy-dev/kleidi/internal/terminal"
	"github.com/beezy-dev/kleidi/seal"
)

// inputOf returns the input from which a command reads secrets.
func inputOf(cmd *cobra.Command) terminal.Input {
	return terminal.Input{In: cmd.InOrStdin(), Err: cmd.ErrOrStderr()}
}

// person is the person at the terminal. It implements founding.Prompter.
type person struct {
	cmd  *cobra.Command
	read func(prompt string) ([]byte, error)
}

func newPerson(cmd *cobra.Command) *person { return &person{cmd, inputOf(cmd).Lines(cmd.Context())} }

// ShowIdentity implements founding.Prompter. It refuses a standard output that is a file,
// and reports one that can't be written, because nothing exists yet: an identity that
// nobody has seen must not become the way back.
func (t *person) ShowIdentity(identity *seal.Secret) error {
	out := t.cmd.OutOrStdout()
	if r, ok := out.(*results); ok && isRegular(r.file) {
		return seal.Errorf("", "run kleidi init at a terminal, or give --recovery-recipient", "standard output is a file, and the recovery identity must not be stored on this machine; nothing was made")
	}
	fmt.Fprint(out, "\nRecovery identity. It is shown once. Keep it off this machine: it opens the keyring\nwhen the TPM does not, and so it does for anyone who finds it.\n\n  ")
	identity.With(func(b []byte) { _, _ = out.Write(bytes.TrimSpace(b)) })
	fmt.Fprint(out, "\n\n")
	if r, ok := out.(*results); ok && r.err != nil {
		return seal.Errorf("", "run kleidi init at a terminal, or give --recovery-recipient", "the recovery identity could not be shown, so nothing was made")
	}
	return nil
}

// AskIdentity implements founding.Prompter.
func (t *person) AskIdentity() ([]byte, error) {
	return t.read("type it again, to show that you kept it (not shown): ")
}

// Tell implements founding.Prompter.
func (t *person) Tell(message string) { fmt.Fprintln(t.cmd.ErrOrStderr(), message) }

func isRegular(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}

// fromStdin stands for standard input in place of a file name.
const fromStdin = "-"

// onTerminal reports whether standard output is a terminal, where a person watches.
func onTerminal() bool { return term.IsTerminal(syscall.Stdout) }
