// Package keyslot is the data of a keyslot that a PKCS#11 token made: its frozen form, the
// names of mechanism, token and key in it, and their limits. It needs no token.
package keyslot

import (
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	kjson "sigs.k8s.io/json"

	"github.com/beezy-dev/kleidi/seal"
)

// Form1 names the first version of Data.
const Form1 = "pkcs11-v1"

// Classes of keys, as the type attribute of a PKCS#11 URI names them.
const (
	ClassSecret  = "secret-key" // AES
	ClassPrivate = "private"    // RSA
)

// Mechanisms, as slots name them.
const (
	MechGCM     = "aes-gcm"              // CKM_AES_GCM
	MechKWP     = "aes-kwp"              // CKM_AES_KEY_WRAP_KWP, C_Encrypt and C_Decrypt
	MechKWPKey  = "aes-kwp-wrapkey"      // CKM_AES_KEY_WRAP_KWP, C_WrapKey and C_UnwrapKey
	MechWrapPad = "aes-wrap-pad-wrapkey" // CKM_AES_KEY_WRAP_PAD, C_WrapKey and C_UnwrapKey
	MechOAEP    = "rsa-oaep-sha256"      // CKM_RSA_PKCS_OAEP, SHA-256, MGF1 with SHA-256, no label
)

// Sizes in bytes.
const (
	// MaxCiphertext is the size of a ciphertext of an RSA key of 16384 bits.
	MaxCiphertext = 2048
	// A token may use an IV of its own, of up to MaxIV.
	MinIV, MaxIV = 12, 16
)

// Maximum sizes of the names of tokens and keys in bytes. Those of tokens are PKCS#11's
// (v2.40, 3.2).
const (
	MaxTokenLabel  = 32
	MaxTokenSerial = 16
	MaxKeyLabel    = 255
	MaxKeyID       = 255
)

// Data is the JSON in Slot.Data. It is untrusted. The names of token and key are
// shown, and compared with the configured ones; nothing is looked up by them.
type Data struct {
	Form       string    `json:"form"`
	Mechanism  string    `json:"mechanism"`
	Token      TokenName `json:"token"`
	Key        KeyName   `json:"key"`
	IV         []byte    `json:"iv,omitempty"` // aes-gcm
	Ciphertext []byte    `json:"ciphertext"`
}

// TokenName names the token that made a keyslot. The keyslot may open on another token: a
// backup, or another member of a cluster of HSMs.
type TokenName struct {
	Label  string `json:"label,omitempty"`
	Serial string `json:"serial,omitempty"`
}

func (n TokenName) String() string { return fmt.Sprintf("%q (serial %q)", n.Label, n.Serial) }

// KeyName names the key that made a keyslot.
type KeyName struct {
	Label string `json:"label,omitempty"`
	ID    HexID  `json:"id,omitempty"`
	// Public is the SHA-256 digest of an RSA key's SubjectPublicKeyInfo.
	Public HexID `json:"public,omitempty"`
}

// HexID is a byte string that JSON and messages show in hexadecimal.
type HexID []byte

// MarshalText implements encoding.TextMarshaler.
func (h HexID) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *HexID) UnmarshalText(b []byte) error {
	*h = make([]byte, hex.DecodedLen(len(b)))
	_, err := hex.Decode(*h, b)
	return err
}

// OtherKey is the error for a keyslot that a key of the right name does not open. The key
// may be a new one of the same name.
func OtherKey(format string, args ...any) error {
	return seal.Errorf(seal.CauseSlotCorrupt, "if the key was made again, or the token replaced, run kleidi slot rewrap NAME --new-key, or kleidi slot remove NAME and kleidi slot add pkcs11; else bring back an undamaged keyring with kleidi keyring restore --previous, or kleidi keyring restore BACKUP",
		"the pkcs11 keyslot is damaged, or of another key: "+format, args...)
}

// Corrupt is the error for a malformed keyslot.
func Corrupt(format string, args ...any) error {
	return seal.Errorf(seal.CauseSlotCorrupt, "replace the keyslot with kleidi slot add pkcs11, or bring back an undamaged keyring with kleidi keyring restore --previous, or kleidi keyring restore BACKUP",
		"the pkcs11 keyslot is damaged: "+format, args...)
}

// Parse parses the data of a keyslot. It refuses unknown and duplicate members, and
// values over the limits.
func Parse(slot seal.Slot) (*Data, error) {
	if slot.Type != seal.TypePKCS11 || slot.Node != "" {
		return nil, seal.ErrNotMine
	}
	if len(slot.Data) > seal.MaxSlotData {
		return nil, Corrupt("%d bytes, at most %d are read", len(slot.Data), seal.MaxSlotData)
	}
	var d Data
	strict, err := kjson.UnmarshalStrict(slot.Data, &d)
	if err == nil && len(strict) > 0 {
		err = strict[0]
	}
	if err != nil {
		return nil, Corrupt("%.200s", err)
	}
	if err := d.check(); err != nil {
		return nil, Corrupt("%w", err)
	}
	return &d, nil
}

// check checks data that is read, and data before it is written.
func (d *Data) check() error {
	if d.Form != Form1 {
		return fmt.Errorf("form %.40q is not known to this version", d.Form)
	}
	if len(d.Token.Label) > MaxTokenLabel || len(d.Token.Serial) > MaxTokenSerial || len(d.Key.Label) > MaxKeyLabel || len(d.Key.ID) > MaxKeyID {
		return fmt.Errorf("a name of the token or of the key is too long")
	}
	if len(d.Key.Label) == 0 && len(d.Key.ID) == 0 {
		return fmt.Errorf("it names no key")
	}
	iv, public := 0, 0
	switch d.Mechanism {
	case MechGCM:
		iv = len(d.IV)
		if iv < MinIV || iv > MaxIV {
			return fmt.Errorf("an IV of %d bytes", iv)
		}
	case MechOAEP:
		public = 32
	case MechKWP, MechKWPKey, MechWrapPad:
	default:
		return fmt.Errorf("mechanism %.40q is not known to this version", d.Mechanism)
	}
	if len(d.IV) != iv || len(d.Key.Public) != public {
		return fmt.Errorf("an IV or a public key that does not belong to %s", d.Mechanism)
	}
	if len(d.Ciphertext) <= seal.KEKSize || len(d.Ciphertext) > MaxCiphertext {
		return fmt.Errorf("a ciphertext of %d bytes", len(d.Ciphertext))
	}
	return nil
}

// Slot returns the keyslot with this data.
func (d *Data) Slot() (seal.Slot, error) {
	if err := d.check(); err != nil {
		return seal.Slot{}, fmt.Errorf("the token's result makes no keyslot: %w", err)
	}
	data, err := json.Marshal(d)
	if err != nil {
		return seal.Slot{}, err
	}
	return seal.Slot{Type: seal.TypePKCS11, Data: data}, nil
}

// Same reports whether k and o name the same key. If both have an ID, the IDs decide,
// because a label can be changed.
func (k KeyName) Same(o KeyName) bool {
	if string(k.Public) != string(o.Public) {
		return false
	}
	if len(k.ID) > 0 && len(o.ID) > 0 {
		return string(k.ID) == string(o.ID)
	}
	return k.Label == o.Label
}

// Sizes of RSA keys in bits.
const MinRSA, MaxRSA = 2048, 16384

// PublicDigest returns the SHA-256 digest of an RSA key's SubjectPublicKeyInfo. It fails
// for a key that is too small, too large or has an unusual exponent.
func PublicDigest(public *rsa.PublicKey) (HexID, error) {
	if n := public.N.BitLen(); n < MinRSA || n > MaxRSA || public.E < 3 || public.E%2 == 0 {
		return nil, fmt.Errorf("the RSA key has %d bits and exponent %d; use one of %d to %d bits with exponent 65537", n, public.E, MinRSA, MaxRSA)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(der)
	return sum[:], nil
}

// Trim removes the padding of PKCS#11's fixed fields, and replaces bytes that are not
// UTF-8.
func Trim(s string) string { return strings.ToValidUTF8(strings.TrimRight(s, " \x00"), "?") }
