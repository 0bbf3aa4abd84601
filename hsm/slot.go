package hsm

import (
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"

	kjson "sigs.k8s.io/json"

	"github.com/beezy-dev/kleidi/seal"
)

// form1 is the first form of a slot's data.
const form1 = "pkcs11-v1"

// Classes of keys, as the type attribute of a PKCS#11 URI names them.
const (
	classSecret  = "secret-key" // AES
	classPrivate = "private"    // RSA
)

// Mechanisms, as slots name them.
const (
	mechGCM     = "aes-gcm"              // CKM_AES_GCM
	mechKWP     = "aes-kwp"              // CKM_AES_KEY_WRAP_KWP, C_Encrypt and C_Decrypt
	mechKWPKey  = "aes-kwp-wrapkey"      // CKM_AES_KEY_WRAP_KWP, C_WrapKey and C_UnwrapKey
	mechWrapPad = "aes-wrap-pad-wrapkey" // CKM_AES_KEY_WRAP_PAD, C_WrapKey and C_UnwrapKey
	mechOAEP    = "rsa-oaep-sha256"      // CKM_RSA_PKCS_OAEP, SHA-256, MGF1 with SHA-256, no label
)

// maxCiphertext bounds what wraps 32 bytes: an RSA key of 16384 bits. maxIV is the
// longest IV that a token made by itself.
const (
	maxCiphertext = 2048
	minIV, maxIV  = 12, 16
)

// slotData is the JSON in Slot.Data. All of it is untrusted. What names token and
// key is compared with what the configuration found, and shown; nothing is looked up by it.
type slotData struct {
	Form       string    `json:"form"`
	Mechanism  string    `json:"mechanism"`
	Token      tokenName `json:"token"`
	Key        keyName   `json:"key"`
	IV         []byte    `json:"iv,omitempty"` // aes-gcm
	Ciphertext []byte    `json:"ciphertext"`
}

// tokenName says on which token a slot was made. It may open on another one: a
// backup, or another member of a cluster of HSMs.
type tokenName struct {
	Label  string `json:"label,omitempty"`
	Serial string `json:"serial,omitempty"`
}

// keyName says which key made a slot.
type keyName struct {
	Label string `json:"label,omitempty"`
	ID    hexID  `json:"id,omitempty"`
	// Public is the SHA-256 digest of an RSA key's SubjectPublicKeyInfo.
	Public hexID `json:"public,omitempty"`
}

// hexID is bytes that JSON and messages show in hexadecimal.
type hexID []byte

// MarshalText implements encoding.TextMarshaler.
func (h hexID) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *hexID) UnmarshalText(b []byte) error {
	*h = make([]byte, hex.DecodedLen(len(b)))
	_, err := hex.Decode(*h, b)
	return err
}

// otherKey is for a slot that a key of the right name does not open: the key may be a new
// one of that name.
func otherKey(format string, args ...any) error {
	return seal.Errorf(seal.CauseSlotCorrupt, "if the key was made anew, or the token replaced, run kleidi slot rewrap with --new-key, or kleidi slot remove and kleidi slot add pkcs11; else bring back an undamaged keyring with kleidi keyring restore",
		"the pkcs11 slot is damaged, or of another key: "+format, args...)
}

func corrupt(format string, args ...any) error {
	return seal.Errorf(seal.CauseSlotCorrupt, "bring back an undamaged keyring with kleidi keyring restore, or make the slot anew with kleidi slot add pkcs11",
		"the pkcs11 slot is damaged: "+format, args...)
}

// parseSlot reads a slot's data strictly and within bounds.
func parseSlot(slot seal.Slot) (*slotData, error) {
	if slot.Type != seal.TypePKCS11 || slot.Node != "" {
		return nil, seal.ErrNotMine
	}
	if len(slot.Data) > seal.MaxSlotData {
		return nil, corrupt("%d bytes, at most %d are read", len(slot.Data), seal.MaxSlotData)
	}
	var d slotData
	strict, err := kjson.UnmarshalStrict(slot.Data, &d)
	if err == nil && len(strict) > 0 {
		err = strict[0]
	}
	if err != nil {
		return nil, corrupt("%.200s", err)
	}
	if err := d.check(); err != nil {
		return nil, corrupt("%w", err)
	}
	return &d, nil
}

// check holds for what is written as for what is read.
func (d *slotData) check() error {
	if d.Form != form1 {
		return fmt.Errorf("form %.40q is not known to this version", d.Form)
	}
	if len(d.Token.Label) > maxTokenLabel || len(d.Token.Serial) > maxTokenSerial || len(d.Key.Label) > maxKeyLabel || len(d.Key.ID) > maxKeyID {
		return fmt.Errorf("a name of the token or of the key is too long")
	}
	if len(d.Key.Label) == 0 && len(d.Key.ID) == 0 {
		return fmt.Errorf("it names no key")
	}
	iv, public := 0, 0
	switch d.Mechanism {
	case mechGCM:
		iv = len(d.IV)
		if iv < minIV || iv > maxIV {
			return fmt.Errorf("an IV of %d bytes", iv)
		}
	case mechOAEP:
		public = 32
	case mechKWP, mechKWPKey, mechWrapPad:
	default:
		return fmt.Errorf("mechanism %.40q is not known to this version", d.Mechanism)
	}
	if len(d.IV) != iv || len(d.Key.Public) != public {
		return fmt.Errorf("an IV or a public key that does not belong to %s", d.Mechanism)
	}
	if len(d.Ciphertext) <= seal.KEKSize || len(d.Ciphertext) > maxCiphertext {
		return fmt.Errorf("a ciphertext of %d bytes", len(d.Ciphertext))
	}
	return nil
}

func (d *slotData) slot() (seal.Slot, error) {
	if err := d.check(); err != nil {
		return seal.Slot{}, fmt.Errorf("what the token made is no slot: %w", err)
	}
	data, err := json.Marshal(d)
	if err != nil {
		return seal.Slot{}, err
	}
	return seal.Slot{Type: seal.TypePKCS11, Data: data}, nil
}

// mayBe reports whether the key that a slot names may be the configured one.
func (k keyMatch) mayBe(name keyName) bool {
	if len(k.id) > 0 && len(name.ID) > 0 {
		return string(k.id) == string(name.ID)
	}
	return k.label == "" || name.Label == "" || len(name.ID) > 0 || k.label == name.Label
}

// Sizes of RSA keys, in bits.
const minRSA, maxRSA = 2048, 16384

// publicDigest is the SHA-256 digest of an RSA key's SubjectPublicKeyInfo. It refuses
// keys that are no use.
func publicDigest(public *rsa.PublicKey) (hexID, error) {
	if n := public.N.BitLen(); n < minRSA || n > maxRSA || public.E < 3 || public.E%2 == 0 {
		return nil, fmt.Errorf("the RSA key has %d bits and exponent %d; use one of %d to %d bits with exponent 65537", n, public.E, minRSA, maxRSA)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(der)
	return sum[:], nil
}
