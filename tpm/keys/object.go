package keys

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
)

// SealedAttributes are the object attributes of every sealed object: it never
// leaves its TPM, no password opens it (userWithAuth clear), and it plays no
// part in the dictionary-attack lockout.
var SealedAttributes = tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, AdminWithPolicy: true}

// NameSize is the size of a Name with SHA-256: the algorithm, then the digest.
const NameSize = 2 + 32

// UnsealTries bounds how often an unseal is repeated because a PCR, for instance IMA's,
// was extended in the meantime.
const UnsealTries = 8

// damaged are the response codes by which TPM2_Load and TPM2_Import blame the object
// (TPM 2.0 Library, Part 3, 12.2). All other codes mean trouble of the TPM itself.
var damaged = []tpm2.TPMRC{
	tpm2.TPMRCIntegrity, tpm2.TPMRCSize, tpm2.TPMRCValue, tpm2.TPMRCAttributes, tpm2.TPMRCHash, tpm2.TPMRCType, tpm2.TPMRCKeySize,
	tpm2.TPMRCScheme, tpm2.TPMRCSymmetric, tpm2.TPMRCBinding, tpm2.TPMRCInsufficient, tpm2.TPMRCSelector, tpm2.TPMRCKDF, tpm2.TPMRCSensitive,
}

// IsDamage reports whether the TPM blames an object that it was to load.
func IsDamage(err error) bool {
	return slices.ContainsFunc(damaged, func(rc tpm2.TPMRC) bool { return errors.Is(err, rc) })
}

// Load loads an object. If the TPM blames the object, broken makes the error.
func Load(t transport.TPM, srk *SRK, public tpm2.TPM2BPublic, private []byte, broken func(format string, args ...any) error) (object tpm2.NamedHandle, err error) {
	r, err := tpm2.Load{ParentHandle: srk.Auth(srk.Session()), InPrivate: tpm2.TPM2BPrivate{Buffer: private}, InPublic: public}.Execute(t)
	if err != nil {
		if IsDamage(err) {
			return object, broken("TPM2_Load: %w", err)
		}
		return object, fmt.Errorf("TPM2_Load: %w", err)
	}
	return tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, nil
}

// Unseal moves the content of a sealed object into locked memory, if its size fits. The
// garbage collection erases the copies that go-tpm leaves behind.
func Unseal(t transport.TPM, object tpm2.NamedHandle, session tpm2.Session, mem seal.Memory, fits func(n int) error) (secret *seal.Secret, err error) {
	seal.Erase(func() {
		var r *tpm2.UnsealResponse
		r, err = tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.Handle, Name: object.Name, Auth: session}}.Execute(t)
		if err != nil {
			err = fmt.Errorf("TPM2_Unseal: %w", err)
			return
		}
		if err = fits(len(r.OutData.Buffer)); err != nil {
			clear(r.OutData.Buffer)
			return
		}
		secret, err = mem.Take(r.OutData.Buffer)
	})
	return secret, err
}

// HexBytes is a byte string that JSON shows in hexadecimal.
type HexBytes []byte

// MarshalText implements encoding.TextMarshaler.
func (h HexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *HexBytes) UnmarshalText(b []byte) error {
	*h = make([]byte, hex.DecodedLen(len(b)))
	_, err := hex.Decode(*h, b)
	return err
}
