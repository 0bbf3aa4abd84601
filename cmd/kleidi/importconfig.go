package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	pinFile string
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
	b, err := readFile(path, hsm.MaxLegacy)
	if err != nil {
		return nil, fmt.Errorf("--import-config: %w", err)
	}
	defer clear(b)
	c, pin, err := hsm.ParseLegacy(n.mem, b)
	if err != nil {
		return nil, fmt.Errorf("--import-config %s: %w", path, err)
	}
	c.Memory, c.Timeout = n.mem, n.cfg.PKCS11.Timeout
	i := &imported{config: c, pin: pin, pinFile: filepath.Join(n.cfg.State.Dir, "pkcs11-pin")}
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

// keepPIN writes the PIN into a file of its own, beside the keyring.
func (i *imported) keepPIN() (err error) {
	i.pin.With(func(b []byte) { err = writeNew(i.pinFile, b) })
	if errors.Is(err, os.ErrExist) {
		return nil // of an init that was killed
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
}
