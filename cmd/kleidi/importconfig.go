package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
)

// imported is the token of kleidi 1.x, taken over.
type imported struct {
	token config.PKCS11 // as the configuration is to have it from now on
	pin   *seal.Secret
	from  string // the config.json
}

// readSecret reads a file of at most limit bytes. The caller clears it.
func readSecret(path string, limit int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readInOne(f, limit)
}

// readInOne reads into one buffer of full size, so that no copy stays behind.
func readInOne(f *os.File, limit int) ([]byte, error) {
	b := make([]byte, limit+1)
	n, err := io.ReadFull(f, b)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return b[:n], nil
	}
	clear(b)
	if err == nil {
		err = fmt.Errorf("%s: it has more than %d bytes", f.Name(), limit)
	}
	return nil, err
}

// importConfig reads the config.json of kleidi 1.x. From then on the configuration,
// in which nothing else may name a token, names its.
func importConfig(path string, cfg *config.Config) (*imported, error) {
	if cfg.PKCS11.Configured() {
		return nil, errors.New("--import-config: pkcs11.module is set already; take it out, or init without --import-config and run kleidi slot add pkcs11")
	}
	b, err := readSecret(path, hsm.MaxLegacy)
	if err != nil {
		return nil, fmt.Errorf("--import-config: %w", err)
	}
	defer clear(b)
	c, pin, err := hsm.ParseLegacy(memory(cfg), b)
	if err != nil {
		return nil, fmt.Errorf("--import-config %s: %w", path, err)
	}
	cfg.PKCS11.Module, cfg.PKCS11.URI, cfg.PKCS11.PINFile = c.Module, legacyURI(c), filepath.Join(cfg.State.Dir, "pkcs11-pin")
	return &imported{token: cfg.PKCS11, pin: pin, from: path}, nil
}

func legacyURI(c hsm.Config) string {
	uri := "pkcs11:object=" + url.PathEscape(c.KeyLabel)
	if c.TokenLabel != "" {
		uri += ";token=" + url.PathEscape(c.TokenLabel)
	}
	if c.TokenSerial != "" {
		uri += ";serial=" + url.PathEscape(c.TokenSerial)
	}
	if c.SlotID != nil {
		uri += fmt.Sprintf(";slot-id=%d", *c.SlotID)
	}
	return uri
}

// takeOver has the token wrap with the PIN at hand, which gets its file only once it has
// shown to be right.
func (n *node) takeOver(i *imported) error {
	if n.needsBoth() == seal.TypeTPMAndVault {
		return errors.New("--import-config: the token alone would open what unlock.order wants two wrappers for; leave it out")
	}
	if err := i.samePIN(n.mem); err != nil {
		return fmt.Errorf("--import-config %s: %w", i.from, err)
	}
	c := i.token.Wrapper(n.mem, nil)
	c.PINFile, c.PIN = "", func(context.Context) (copied *seal.Secret, err error) {
		i.pin.With(func(b []byte) { copied, err = n.mem.Take(append([]byte(nil), b...)) })
		return copied, err
	}
	token, err := hsm.New(c)
	if err != nil {
		return fmt.Errorf("--import-config %s: %w", i.from, err)
	}
	n.hsm = token
	return nil
}

// close forgets the PIN.
func (i *imported) close() { _ = i.pin.Close() }

// opens reports whether the token may open the keyring at start.
func (i *imported) opens(order []string) bool {
	return slices.Contains(order, seal.TypePKCS11) || slices.Contains(order, seal.TypeTPMAndPKCS11)
}

// maxPINFile bounds the file of a PIN, in bytes.
const maxPINFile = 4 << 10

// samePIN refuses a file that is there already, and with which the token would not
// open. That of an init that was killed holds the same PIN.
func (i *imported) samePIN(mem seal.Memory) error {
	b, err := readSecret(i.token.PINFile, maxPINFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer clear(b)
	line, _, _ := bytes.Cut(b, []byte("\n"))
	if line = bytes.TrimSuffix(line, []byte("\r")); len(line) > 0 {
		there, err := mem.Take(line)
		if err != nil {
			return err
		}
		defer there.Close()
		if there.Equal(i.pin) {
			return nil
		}
	}
	return fmt.Errorf("%s is there already, and holds another PIN than that; move it away, or correct the pin, and run kleidi init again", i.token.PINFile)
}

// keepPIN writes the PIN into a file of its own, beside the keyring.
func (i *imported) keepPIN() (err error) {
	i.pin.With(func(b []byte) { err = writeNew(i.token.PINFile, b) })
	if errors.Is(err, os.ErrExist) {
		return nil // it holds the same PIN, see samePIN
	}
	return err
}
