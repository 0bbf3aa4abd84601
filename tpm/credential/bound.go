package credential

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// boundPCR holds the state and the keys of Secure Boot. An object bound to it alone
// demands nothing of the kernel, because the object must outlive kernel updates. The
// slots' authorization policies decide which boots may open the keyring.
const boundPCR = 7

// bound is an object that this TPM can use only while PCR 7 has the value from when the
// object was made. It is kept as JSON in a file. Nothing in the file is secret, and the
// file is useless to any other TPM.
type bound struct {
	Form    string           `json:"form"`
	SRK     keys.HexBytes    `json:"srk"` // Name of the storage root key
	Bank    string           `json:"bank"`
	PCR7    keys.HexBytes    `json:"pcr7"`
	Public  []byte           `json:"public"`  // TPMT_PUBLIC
	Private []byte           `json:"private"` // TPM2B_PRIVATE's buffer
	terms   authpolicy.Terms // from Bank and PCR7
}

// boundKind holds what distinguishes the kinds of such files.
type boundKind struct {
	form    string // the version of the file
	max     int    // bounds the file, in bytes
	name    string // in messages
	command string // the command that makes it
	renew   string // a hint: how to replace it
	without string // a hint: how to do without it
}

// newBound returns a new bound for the present value of PCR 7, and the digest of its
// authorization policy.
func newBound(t transport.TPM, srk *keys.SRK, bank crypto.Hash, kind *boundKind) (b bound, digest []byte, err error) {
	// The audit session authenticates the value: an impostor in the TPM's place must
	// not choose it.
	r, err := tpm2.PCRRead{PCRSelectionIn: authpolicy.Selection(bank, []int{boundPCR})}.Execute(t, srk.Session(tpm2.Audit()))
	if err != nil {
		return b, nil, fmt.Errorf("TPM2_PCR_Read: %w", err)
	}
	if len(r.PCRValues.Digests) != 1 {
		return b, nil, keys.MissingPCRs(t, bank, []int{boundPCR})
	}
	b = bound{Form: kind.form, SRK: srk.Name.Buffer, Bank: keys.BankName(bank), PCR7: r.PCRValues.Digests[0].Buffer}
	digest, err = b.authorization()
	if err != nil {
		return b, nil, seal.Errorf(seal.CauseBootState, kind.without+"; check that the firmware measures into the bank that tpm.bank names",
			"no %s can be bound to this boot: %w", kind.name, err)
	}
	return b, digest, nil
}

// authorization computes the terms from the bank and PCR 7, and their digest.
func (b *bound) authorization() ([]byte, error) {
	bank, err := keys.ParseBank(b.Bank)
	if err != nil {
		return nil, err
	}
	b.terms = authpolicy.Terms{authpolicy.PCR{Bank: bank, Values: map[int][]byte{boundPCR: b.PCR7}}}
	return b.terms.Digest()
}

// create makes the object.
func (b *bound) create(t transport.TPM, cmd tpm2.Create) error {
	r, err := cmd.Execute(t)
	if err != nil {
		return fmt.Errorf("TPM2_Create: %w", err)
	}
	b.Public, b.Private = r.OutPublic.Bytes(), r.OutPrivate.Buffer
	return nil
}

// marshalBound returns the content of the file.
func marshalBound(whole any) ([]byte, error) {
	b, err := json.Marshal(whole)
	return append(b, '\n'), err
}

// damaged says that a file can't be used on any TPM.
func (k *boundKind) damaged(format string, args ...any) error {
	return seal.Errorf(seal.CauseCredentials, "bring back the file, or "+k.renew, "the file of the "+k.name+" is damaged: "+format, args...)
}

// parse reads a file into whole, in which b is embedded. Each object has exactly one
// form. parse returns the digest that the object's authorization policy must have.
func (b *bound) parse(kind *boundKind, file []byte, whole any) (digest []byte, err error) {
	if len(file) > kind.max {
		return nil, kind.damaged("more than %d bytes", kind.max)
	}
	if err := json.Unmarshal(file, whole); err != nil {
		return nil, kind.damaged("%w", err)
	}
	if b.Form != kind.form {
		return nil, kind.damaged("form %+.40q is not known to this version", b.Form)
	}
	if len(b.SRK) != keys.NameSize { // an empty Name would match any key
		return nil, kind.damaged("the Name of its storage root key has %d bytes, want %d", len(b.SRK), keys.NameSize)
	}
	if digest, err = b.authorization(); err != nil {
		return nil, kind.damaged("%w", err)
	}
	if same, err := marshalBound(whole); err != nil || !bytes.Equal(same, file) {
		return nil, kind.damaged("it is not as kleidi %s writes it", kind.command)
	}
	return digest, nil
}

// useBound runs f with the object loaded, and with a session that satisfies its
// authorization policy. The session is salted to the storage root key that the file
// names, so the response provably comes from that TPM.
func useBound(ctx context.Context, d *device.Device, owner keys.Owner, b *bound, kind *boundKind, f func(transport.TPM, tpm2.NamedHandle, tpm2.Session) error, opts ...tpm2.AuthOption) error {
	return d.Do(ctx, func(t transport.TPM) error {
		return keys.WithSRK(t, owner, b.SRK, func(srk *keys.SRK) (err error) {
			for range keys.UnsealTries {
				err = b.use(t, srk, kind, f, append(opts, srk.Salted()))
				if !errors.Is(err, tpm2.TPMRCPCRChanged) {
					break
				}
			}
			return err
		})
	})
}

// use loads the object last, as package tpm's Wrapper.unsealOnce does.
func (b *bound) use(t transport.TPM, srk *keys.SRK, kind *boundKind, f func(transport.TPM, tpm2.NamedHandle, tpm2.Session) error, opts []tpm2.AuthOption) error {
	session, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, keys.NonceSize, opts...)
	if err != nil {
		return fmt.Errorf("TPM2_StartAuthSession: %w", err)
	}
	defer func() { _ = done() }() // a session that the TPM has already ended can't be ended again
	if err := b.terms.Satisfy(t, session); err != nil {
		return err
	}
	object, err := keys.Load(t, srk, tpm2.BytesAs2B[tpm2.TPMTPublic](b.Public), b.Private, kind.damaged)
	if err != nil {
		return err
	}
	defer keys.Flush(t, object.Handle)
	return f(t, object, session)
}
