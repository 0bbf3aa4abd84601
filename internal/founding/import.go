package founding

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
)

// Import is the imported token of kleidi 1.x.
type Import struct {
	Token config.PKCS11 // for the configuration from now on
	pin   *seal.Secret
	From  string // the config.json
}

// Close forgets the PIN.
func (i *Import) Close() { _ = i.pin.Close() }

// Opens reports whether the token may open the keyring at start.
func (i *Import) Opens(order []string) bool {
	return slices.Contains(order, seal.TypePKCS11) || slices.Contains(order, seal.TypeTPMAndPKCS11)
}

// samePIN refuses an existing PIN file with another PIN. A file that a killed init
// left holds the same PIN.
func (i *Import) samePIN(mem seal.Memory) error {
	b, err := files.ReadSecret(i.Token.PINFile, maxPINFile)
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
	return fmt.Errorf("%s exists already, and holds a different PIN; move it away, or correct the pin, and run kleidi init again", i.Token.PINFile)
}

// keepPIN writes the PIN into a separate file, beside the keyring.
func (i *Import) keepPIN() (err error) {
	i.pin.With(func(b []byte) { err = files.WriteNew(i.Token.PINFile, b) })
	if errors.Is(err, os.ErrExist) {
		return nil // the file holds the same PIN, see samePIN
	}
	return err
}

// TokenSettings are the settings of a token, as section pkcs11 of the configuration names
// them.
type TokenSettings struct {
	Module  string `json:"module"`
	URI     string `json:"uri"`
	PINFile string `json:"pinFile"`
}

// ReadImport reads the config.json of kleidi 1.x, and puts its token into cfg. cfg must
// not name another token.
func ReadImport(path string, cfg *config.Config) (*Import, error) {
	b, err := files.ReadSecret(path, hsm.MaxLegacy)
	if err != nil {
		return nil, fmt.Errorf("--import-config: %w", err)
	}
	defer clear(b)
	c, pin, err := hsm.ParseLegacy(node.MemoryOf(cfg), b)
	if errors.Is(err, hsm.ErrLegacyVault) {
		return nil, config.LegacyVault(path, b)
	}
	if err != nil {
		return nil, fmt.Errorf("--import-config %s: %w", path, err)
	}
	if cfg.PKCS11.Configured() {
		_ = pin.Close()
		return nil, errors.New("--import-config: pkcs11.module is set already; take it out, or init without --import-config and run kleidi slot add pkcs11")
	}
	cfg.PKCS11.Module, cfg.PKCS11.URI, cfg.PKCS11.PINFile = c.Module, legacyURI(c), filepath.Join(cfg.State.Dir, "pkcs11-pin")
	return &Import{Token: cfg.PKCS11, pin: pin, From: path}, nil
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

// useToken makes the token wrap with the PIN in memory. The PIN gets its file only
// after it has proved to be right.
func useToken(n *node.Node, i *Import) error {
	if n.View.TwoOfTwo() == seal.TypeTPMAndVault {
		return errors.New("--import-config: the token alone would open what unlock.order wants two wrappers for; leave it out")
	}
	if err := i.samePIN(n.Memory); err != nil {
		return fmt.Errorf("--import-config %s: %w", i.From, err)
	}
	c := i.Token.Wrapper(n.Memory, nil)
	c.PINFile, c.PIN = "", func(context.Context) (copied *seal.Secret, err error) {
		i.pin.With(func(b []byte) { copied, err = n.Memory.Take(append([]byte(nil), b...)) })
		return copied, err
	}
	token, err := hsm.New(c)
	if err != nil {
		return fmt.Errorf("--import-config %s: %w", i.From, err)
	}
	n.HSM = token
	return nil
}

// maxPINFile bounds the file of a PIN, in bytes.
const maxPINFile = 4 << 10
