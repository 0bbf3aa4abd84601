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

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/seal"
)

// imported is the token of kleidi 1.x, taken over.
type imported struct {
	config  hsm.Config
	pin     *seal.Secret
	from    string // the config.json
	pinFile string
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

// importConfig reads the config.json of kleidi 1.x, and has its token be this
// node's PKCS#11 wrapper.
func (n *node) importConfig(path string) (*imported, error) {
	if n.needsBoth() != "" {
		return nil, errors.New("--import-config: the token alone would open what unlock.order wants two wrappers for")
	}
	if n.hsm != nil {
		return nil, errors.New("--import-config: pkcs11.module is set already; take it out, or init without --import-config and run kleidi slot add pkcs11")
	}
	b, err := readSecret(path, hsm.MaxLegacy)
	if err != nil {
		return nil, fmt.Errorf("--import-config: %w", err)
	}
	defer clear(b)
	c, pin, err := hsm.ParseLegacy(n.mem, b)
	if err != nil {
		return nil, fmt.Errorf("--import-config %s: %w", path, err)
	}
	c.Memory, c.Timeout = n.mem, n.cfg.PKCS11.Timeout
	i := &imported{config: c, pin: pin, from: path, pinFile: filepath.Join(n.cfg.State.Dir, "pkcs11-pin")}
	if err := i.samePIN(n.mem); err != nil {
		pin.Close()
		return nil, fmt.Errorf("--import-config %s: %w", path, err)
	}
	c.PIN = func(context.Context) (copied *seal.Secret, err error) {
		pin.With(func(b []byte) { copied, err = n.mem.Take(append([]byte(nil), b...)) })
		return copied, err
	}
	if n.hsm, err = hsm.New(c); err != nil {
		pin.Close()
		return nil, fmt.Errorf("--import-config %s: %w", path, err)
	}
	return i, nil
}

// maxPINFile bounds the file of a PIN, in bytes.
const maxPINFile = 4 << 10

// samePIN refuses a file that is there already, and with which the token would not
// open. That of an init that was killed holds the same PIN.
func (i *imported) samePIN(mem seal.Memory) error {
	b, err := readSecret(i.pinFile, maxPINFile)
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
	return fmt.Errorf("%s is there already, and holds another PIN than that; move it away, or correct the pin, and run kleidi init again", i.pinFile)
}

// keepPIN writes the PIN into a file of its own, beside the keyring.
func (i *imported) keepPIN() (err error) {
	i.pin.With(func(b []byte) { err = writeNew(i.pinFile, b) })
	if errors.Is(err, os.ErrExist) {
		return nil // it holds the same PIN, see samePIN
	}
	return err
}

// print shows what the configuration needs from now on.
func (i *imported) print(w io.Writer) {
	uri := "pkcs11:object=" + url.PathEscape(i.config.KeyLabel)
	if i.config.TokenLabel != "" {
		uri += ";token=" + url.PathEscape(i.config.TokenLabel)
	}
	if i.config.TokenSerial != "" {
		uri += ";serial=" + url.PathEscape(i.config.TokenSerial)
	}
	if i.config.SlotID != nil {
		uri += fmt.Sprintf(";slot-id=%d", *i.config.SlotID)
	}
	fmt.Fprintf(w, "\nadd to the configuration, so that kleidi serve can use the token:\n\n  pkcs11:\n    module: %s\n    uri: %s\n    pinFile: %s\n", i.config.Module, uri, i.pinFile)
	fmt.Fprintf(w, "\nthe token opens nothing at start until unlock.order names pkcs11, as in [tpm, pkcs11]\n%s holds the PIN as well, for kleidi 1.x: when that is gone, remove the file and change the PIN\n", i.from)
}
