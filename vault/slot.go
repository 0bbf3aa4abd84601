package vault

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
	kjson "sigs.k8s.io/json"
)

// slotFormat is the version of slotData. No other version is read.
const slotFormat = 1

// maxCiphertext is the maximum size of Transit's ciphertext of a KEK in characters. With
// AES-GCM it has 90, with RSA 4096 about 700.
const maxCiphertext = 4096

// slotData is the JSON in Slot.Data. It is untrusted. The names are compared with the
// configuration, and used for nothing else.
type slotData struct {
	Format     int    `json:"format"`
	Namespace  string `json:"namespace,omitempty"`
	Mount      string `json:"mount"`
	Key        string `json:"key"`
	Ciphertext string `json:"ciphertext"`
}

func (c Config) slot(ciphertext string) (seal.Slot, error) {
	if _, err := version(ciphertext); err != nil {
		return seal.Slot{}, seal.Errorf(seal.CauseUnavailable, hintNotVault, "vault: the answer holds no ciphertext: %w", err)
	}
	data, err := json.Marshal(slotData{slotFormat, c.Namespace, c.Mount, c.Key, ciphertext})
	if err != nil {
		return seal.Slot{}, fmt.Errorf("vault: slot: %w", err)
	}
	return seal.Slot{Type: seal.TypeVault, Data: data}, nil
}

// ciphertext returns the ciphertext in a slot. The error is seal.ErrNotMine if the slot
// names another key, mount or namespace than the configuration.
func (c Config) ciphertext(slot seal.Slot) (string, error) {
	data, err := parseSlot(slot)
	if err != nil {
		return "", err
	}
	if data.Namespace != c.Namespace || data.Mount != c.Mount || data.Key != c.Key {
		return "", seal.ErrNotMine
	}
	return data.Ciphertext, nil
}

// Version returns the version of the Transit key that encrypted a slot, 1 or more. It
// does not ask the server. The error is seal.ErrNotMine if the slot has another type.
func Version(slot seal.Slot) (int, error) {
	data, err := parseSlot(slot)
	if err != nil {
		return 0, err
	}
	return version(data.Ciphertext)
}

func parseSlot(slot seal.Slot) (data slotData, err error) {
	if slot.Type != seal.TypeVault {
		return data, seal.ErrNotMine
	}
	if len(slot.Data) > seal.MaxSlotData {
		return data, corrupt(fmt.Errorf("%d bytes, at most %d", len(slot.Data), seal.MaxSlotData))
	}
	strict, err := kjson.UnmarshalStrict(slot.Data, &data)
	if err != nil || len(strict) > 0 {
		return slotData{}, corrupt(errors.New("it does not have the form that kleidi writes"))
	}
	if data.Format != slotFormat {
		return slotData{}, corrupt(fmt.Errorf("format %d, this kleidi reads %d", data.Format, slotFormat))
	}
	if _, err := version(data.Ciphertext); err != nil {
		return slotData{}, corrupt(err)
	}
	return data, nil
}

// version returns N of "vault:vN:…", which is the form of Vault and of OpenBao.
func version(ciphertext string) (int, error) {
	if len(ciphertext) > maxCiphertext {
		return 0, fmt.Errorf("a ciphertext of %d characters, at most %d", len(ciphertext), maxCiphertext)
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

func corrupt(err error) error {
	return seal.Errorf(seal.CauseSlotCorrupt, hintRestore, "vault slot: %w", err)
}
