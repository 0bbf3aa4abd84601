// Package terminal reads secrets from a person: hidden at a terminal, otherwise from
// standard input. It also asks a person there to confirm a change, and shows how far a long
// read is.
package terminal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/term"

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/seal"
)

// Input is where secrets are read from, and where a prompt is shown.
type Input struct {
	In  io.Reader
	Err io.Writer
}

// Lines returns a function that reads secrets line by line: hidden at a terminal,
// otherwise from standard input.
func (i Input) Lines(ctx context.Context) func(prompt string) ([]byte, error) {
	if f, ok := i.In.(*os.File); ok && Is(f) {
		return func(prompt string) ([]byte, error) { return i.Secret(ctx, prompt) }
	}
	in := i.In
	return func(string) ([]byte, error) { return ReadLine(in) }
}

// ReadLine reads a line of at most [Max] bytes. It reads byte by byte, so that no buffer
// keeps later bytes.
func ReadLine(r io.Reader) ([]byte, error) {
	b := make([]byte, 0, Max)
	var c [1]byte
	for len(b) < Max {
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
	return nil, fmt.Errorf("more than %d bytes", Max)
}

// PIN reads a PIN from a file, or a line from standard input. At a terminal it asks
// twice, because a wrong PIN would cost a try on the token.
func (i Input) PIN(ctx context.Context, mem seal.Memory, file string) (*seal.Secret, error) {
	if file != "" {
		return hsm.ReadPIN(mem, file)
	}
	read := i.Lines(ctx)
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
	if in, ok := i.In.(*os.File); !ok || !Is(in) {
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

// Max bounds a line and an identity file, in bytes.
const Max = 16 << 10

// Identity reads a recovery identity. It never takes the identity from the command line,
// which ps shows.
func (i Input) Identity(ctx context.Context, file string) ([]byte, error) {
	if file == "" {
		return i.Secret(ctx, "recovery identity (AGE-SECRET-KEY-…, not shown): ")
	}
	f, err := regular.OpenArgument(file)
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

// Secret reads a line without showing it; without a terminal, all of
// standard input.
func (i Input) Secret(ctx context.Context, prompt string) ([]byte, error) {
	in, ok := i.In.(*os.File)
	if !ok || !Is(in) {
		return readBounded(i.In)
	}
	fmt.Fprint(i.Err, prompt)
	defer fmt.Fprintln(i.Err)
	return readHidden(ctx, in)
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
	b := make([]byte, Max)
	n, err := io.ReadFull(r, b)
	if err == nil {
		clear(b)
		return nil, fmt.Errorf("recovery identity: more than %d bytes", Max)
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

// Is reports whether f is a terminal.
func Is(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }
