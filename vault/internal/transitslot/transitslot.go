// Package transitslot is the data of a slot that a Transit key made: its frozen form and its
// limits. It needs no server.
package transitslot

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
	kjson "sigs.k8s.io/json"
)

// HintRestore is the remedy for a malformed slot.
const HintRestore = "run kleidi keyring restore --previous, or kleidi keyring restore BACKUP"

// Format is the version of Data. No other version is read.
const Format = 1

// MaxCiphertext is the maximum size of Transit's ciphertext of a KEK in characters. With
// AES-GCM it has 90, with RSA 4096 about 700.
const MaxCiphertext = 4096

// Data is the JSON in Slot.Data. It is untrusted. The names are compared with the
// configuration, and used for nothing else.
type Data struct {
	Format     int    `json:"format"`
	Namespace  string `json:"namespace,omitempty"`
	Mount      string `json:"mount"`
	Key        string `json:"key"`
	Ciphertext string `json:"ciphertext"`
}

// Parse parses the data of a slot.
func Parse(slot seal.Slot) (data Data, err error) {
	if slot.Type != seal.TypeVault {
		return data, seal.ErrNotMine
	}
	if len(slot.Data) > seal.MaxSlotData {
		return data, Corrupt(fmt.Errorf("%d bytes, at most %d", len(slot.Data), seal.MaxSlotData))
	}
	strict, err := kjson.UnmarshalStrict(slot.Data, &data)
	if err != nil || len(strict) > 0 {
		return Data{}, Corrupt(errors.New("it does not have the form that kleidi writes"))
	}
	if data.Format != Format {
		return Data{}, Corrupt(fmt.Errorf("format %d, this kleidi reads %d", data.Format, Format))
	}
	if _, err := Version(data.Ciphertext); err != nil {
		return Data{}, Corrupt(err)
	}
	return data, nil
}

// Version returns N of "vault:vN:…", which is the form of Vault and of OpenBao.
func Version(ciphertext string) (int, error) {
	if len(ciphertext) > MaxCiphertext {
		return 0, fmt.Errorf("a ciphertext of %d characters, at most %d", len(ciphertext), MaxCiphertext)
	}
	rest, ok := strings.CutPrefix(ciphertext, "vault:v")
	number, encoded, colon := strings.Cut(rest, ":")
	n, err := strconv.ParseUint(number, 10, 31)
	if !ok || !colon || err != nil || n == 0 || number != strconv.FormatUint(n, 10) || !isBase64(encoded) {
		return 0, errors.New("the ciphertext does not have the form vault:vN:base64")
	}
	return int(n), nil
}

func isBase64(s string) bool {
	for _, c := range []byte(s) {
		switch {
		case 'A' <= c && c <= 'Z', 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '+', c == '/', c == '=':
		default:
			return false
		}
	}
	return s != ""
}

// Corrupt is the error for a malformed slot.
func Corrupt(err error) error {
	return seal.Errorf(seal.CauseSlotCorrupt, HintRestore, "vault slot: %w", err)
}
