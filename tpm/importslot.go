package tpm

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Peer is the TPM of another node, as the node's entry in the keyring describes it.
type Peer struct {
	Node  string
	EK    string // digest, only for messages: see [keys.EKDigest]
	SRK   []byte // TPMT_PUBLIC
	Epoch EpochIndex
}

// ParseSRK reads the public area of a storage root key. It accepts only the template
// that kleidi uses. So the Name identifies a TPM parent: a restricted decryption key,
// which never reveals what was wrapped for it.
func ParseSRK(public []byte) (*tpm2.TPMTPublic, error) {
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, fmt.Errorf("storage root key: %w", err)
	}
	want := tpm2.ECCSRKTemplate
	want.Unique = p.Unique
	point, err := p.Unique.ECC()
	if err != nil || point == nil || len(point.X.Buffer) != 32 || len(point.Y.Buffer) != 32 ||
		!bytes.Equal(tpm2.Marshal(p), public) || !bytes.Equal(tpm2.Marshal(want), public) {
		return nil, errors.New("storage root key: it is not of the TCG's ECC P-256 template")
	}
	return p, nil
}

// WrapFor wraps kek for a boot state of another node, up to and including the epoch
// atMost. It needs no TPM. The wrapper of that node opens the slot.
func WrapFor(p Peer, kek *seal.Secret, state BootState, atMost uint64) (seal.Slot, error) {
	state.Record = nil // the node itself knows what led to the values
	if err := state.Check(); err != nil {
		return seal.Slot{}, seal.Errorf(seal.CauseBootState, "choose other PCRs with tpm.pcrs on that node", "node %s: this boot state can't be sealed to: %w", p.Node, err)
	}
	d := newSlotData(&state)
	d.EK, d.Epoch = p.EK, slotEpoch{Index: p.Epoch.Index(), AtMost: atMost}
	digest, err := terms(&state, p.Epoch, atMost).Digest()
	if err != nil {
		return seal.Slot{}, fmt.Errorf("wrap for node %s: %w", p.Node, err)
	}
	if err := d.wrapImport(p.SRK, kek, digest); err != nil {
		return seal.Slot{}, fmt.Errorf("wrap for node %s: %w", p.Node, err)
	}
	d.Form = d.form()
	data, err := json.Marshal(d)
	if err != nil {
		return seal.Slot{}, err
	}
	return seal.Slot{Type: seal.TypeTPM, Node: p.Node, Data: data}, nil
}

// wrapImport sets the fields that depend on the KEK: the public area of the object, and
// its private area, encrypted to the storage root key.
func (d *slotData) wrapImport(srkPublic []byte, kek *seal.Secret, digest []byte) error {
	srk, err := ParseSRK(srkPublic)
	if err != nil {
		return err
	}
	name, err := tpm2.ObjectName(srk)
	if err != nil {
		return fmt.Errorf("storage root key: %w", err)
	}
	d.SRK = name.Buffer
	key, err := tpm2.ImportEncapsulationKey(srk)
	if err != nil {
		return fmt.Errorf("storage root key: %w", err)
	}
	err = errors.New("no KEK to wrap: it is closed or has the wrong size")
	defer seal.Collect() // the buffers that go-tpm marshalled
	kek.With(func(b []byte) {
		if len(b) == seal.KEKSize {
			seal.Erase(func() { err = d.encapsulate(key, b, digest) })
		}
	})
	return err
}

// encapsulate makes a sealed object as the TPM would make it (TPM 2.0 Library, Part 1,
// 27.6.3, for the unique field), and the duplicate of that object.
func (d *slotData) encapsulate(key tpm2.LabeledEncapsulationKey, kek, digest []byte) error {
	seed := make([]byte, sha256.Size)
	rand.Read(seed)
	unique := sha256.Sum256(append(bytes.Clone(seed), kek...))
	public := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: importAttributes, AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull}}),
		Unique:     tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: unique[:]}),
	}
	sensitive := tpm2.Marshal(tpm2.TPMTSensitive{
		SensitiveType: tpm2.TPMAlgKeyedHash, SeedValue: tpm2.TPM2BDigest{Buffer: seed},
		Sensitive: tpm2.NewTPMUSensitiveComposite(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BSensitiveData{Buffer: kek}),
	})
	defer clear(sensitive)
	name, err := tpm2.ObjectName(&public)
	if err != nil {
		return err
	}
	d.Public = tpm2.Marshal(public)
	d.Private, d.EncSeed, err = tpm2.CreateDuplicate(rand.Reader, key, name.Buffer, sensitive)
	return err
}

// imported returns the private area of the slot's object in the form that this TPM
// loads: TPM2_Import converts the duplicate.
func (d *slotData) imported(t transport.TPM, srk *keys.SRK) ([]byte, error) {
	if d.EncSeed == nil {
		return d.Private, nil
	}
	r, err := tpm2.Import{
		ParentHandle: srk.Auth(srk.Session()), ObjectPublic: tpm2.New2B(*d.public), Duplicate: tpm2.TPM2BPrivate{Buffer: d.Private},
		InSymSeed: tpm2.TPM2BEncryptedSecret{Buffer: d.EncSeed}, Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
	}.Execute(t)
	switch {
	case err != nil && keys.IsDamage(err):
		return nil, corrupt("TPM2_Import: %w", err)
	case err != nil:
		return nil, fmt.Errorf("TPM2_Import: %w", err)
	}
	return r.OutPrivate.Buffer, nil
}
