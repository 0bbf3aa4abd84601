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

// form1 names the first version of slotData.
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

// Sizes in bytes.
const (
	// maxCiphertext is the size of a ciphertext of an RSA key of 16384 bits.
	maxCiphertext = 2048
	// A token may use an IV of its own, of up to maxIV.
	minIV, maxIV = 12, 16
)

// slotData is the JSON in Slot.Data. It is untrusted. The names of token and key are
// shown, and compared with the configured ones; nothing is looked up by them.
type slotData struct {
	Form       string    `json:"form"`
	Mechanism  string    `json:"mechanism"`
	Token      tokenName `json:"token"`
	Key        keyName   `json:"key"`
	IV         []byte    `json:"iv,omitempty"` // aes-gcm
	Ciphertext []byte    `json:"ciphertext"`
}

// tokenName names the token that made a keyslot. The keyslot may open on another token: a
// backup, or another member of a cluster of HSMs.
type tokenName struct {
	Label  string `json:"label,omitempty"`
	Serial string `json:"serial,omitempty"`
}

// keyName names the key that made a keyslot.
type keyName struct {
	Label string `json:"label,omitempty"`
	ID    hexID  `json:"id,omitempty"`
	// Public is the SHA-256 digest of an RSA key's SubjectPublicKeyInfo.
	Public hexID `json:"public,omitempty"`
}

// hexID is a byte string that JSON and messages show in hexadecimal.
type hexID []byte

// MarshalText implements encoding.TextMarshaler.
func (h hexID) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *hexID) UnmarshalText(b []byte) error {
	*h = make([]byte, hex.DecodedLen(len(b)))
	_, err := hex.Decode(*h, b)
	return err
}

// otherKey is the error for a keyslot that a key of the right name does not open. The key
// may be a new one of the same name.
func otherKey(format string, args ...any) error {
	return seal.Errorf(seal.CauseSlotCorrupt, "if the key was made again, or the token replaced, run kleidi slot rewrap NAME --new-key, or kleidi slot remove NAME and kleidi slot add pkcs11; else bring back an undamaged keyring with kleidi keyring restore --previous, or kleidi keyring restore BACKUP",
		"the pkcs11 keyslot is damaged, or of another key: "+format, args...)
}

func corrupt(format string, args ...any) error {
	return seal.Errorf(seal.CauseSlotCorrupt, "replace the keyslot with kleidi slot add pkcs11, or bring back an undamaged keyring with kleidi keyring restore --previous, or kleidi keyring restore BACKUP",
		"the pkcs11 keyslot is damaged: "+format, args...)
}

// parseSlot parses the data of a keyslot. It refuses unknown and duplicate members, and
// values over the limits.
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

// check checks data that is read, and data before it is written.
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
		return seal.Slot{}, fmt.Errorf("the token's result makes no keyslot: %w", err)
	}
	data, err := json.Marshal(d)
	if err != nil {
		return seal.Slot{}, err
	}
	return seal.Slot{Type: seal.TypePKCS11, Data: data}, nil
}

// same reports whether k and o name the same key. If both have an ID, the IDs decide,
// because a label can be changed.
func (k keyName) same(o keyName) bool {
	if string(k.Public) != string(o.Public) {
		return false
	}
	if len(k.ID) > 0 && len(o.ID) > 0 {
		return string(k.ID) == string(o.ID)
	}
	return k.Label == o.Label
}

// mayMatch reports whether the key that a keyslot names may be the configured one.
func (k keyMatch) mayMatch(name keyName) bool {
	if len(k.id) > 0 && len(name.ID) > 0 {
		return string(k.id) == string(name.ID)
	}
	return k.label == "" || name.Label == "" || len(name.ID) > 0 || k.label == name.Label
}

// Sizes of RSA keys in bits.
const minRSA, maxRSA = 2048, 16384

// publicDigest returns the SHA-256 digest of an RSA key's SubjectPublicKeyInfo. It fails
// for a key that is too small, too large or has an unusual exponent.
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
