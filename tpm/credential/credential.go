package credential

import (
	"bytes"
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Max bounds a sealed credential, in bytes: every TPM accepts this size
// (MAX_SYM_DATA, TCG PC Client Platform TPM Profile).
const Max = 128

// MaxFile bounds the file of a sealed credential, in bytes.
const MaxFile = 4 << 10

var credentialKind = &boundKind{
	form: "sealed-credential-v1", max: MaxFile, name: "sealed credential", command: "pkcs11-pin",
	renew: hintCredential, without: "keep the PIN in a file, with pkcs11.pinFile",
}

const hintCredential = "seal a new one with kleidi pkcs11-pin --pin-file FILE --out FILE"

// sealedCredential is the JSON in the file of a sealed credential.
type sealedCredential struct {
	bound
	EK string `json:"ek"` // digest of the endorsement key, see keys.EKDigest
}

// credentialTemplate is a sealed object like that of a KEK, see [keys.SealedAttributes].
func credentialTemplate(digest []byte) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: keys.SealedAttributes, AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull}}),
	}
}

// Seal seals a credential of 1 to [Max] bytes to this TPM and to
// the present value of PCR 7 of the bank: after a change of Secure Boot's state or
// keys, seal it again. blob is the content of the file to keep, at most
// [MaxFile] bytes. No other TPM can open it, nor can this TPM after
// TPM2_Clear.
func Seal(ctx context.Context, d *device.Device, owner keys.Owner, bank crypto.Hash, credential *seal.Secret) (blob []byte, err error) {
	var size int
	credential.With(func(b []byte) { size = len(b) })
	if size == 0 || size > Max {
		return nil, fmt.Errorf("a credential of %d bytes can't be sealed; want 1 to %d", size, Max)
	}
	defer seal.Collect() // the command, as go-tpm marshalled it
	c := &sealedCredential{}
	err = d.Do(ctx, func(t transport.TPM) (err error) {
		if c.EK, err = keys.EKDigest(t); err != nil {
			return err
		}
		return keys.WithSRK(t, owner, nil, func(srk *keys.SRK) error { return c.seal(t, srk, bank, credential) })
	})
	if err != nil {
		return nil, device.Classify(err)
	}
	if blob, err = marshalBound(c); err != nil {
		return nil, err
	}
	_, err = parseCredential(blob)
	return blob, err
}

// seal creates the sealed object; the credential crosses the bus encrypted.
func (c *sealedCredential) seal(t transport.TPM, srk *keys.SRK, bank crypto.Hash, credential *seal.Secret) error {
	b, digest, err := newBound(t, srk, bank, credentialKind)
	if err != nil {
		return err
	}
	c.bound = b
	credential.With(func(b []byte) {
		err = c.create(t, tpm2.Create{
			ParentHandle: srk.Auth(srk.Session(tpm2.AESEncryption(128, tpm2.EncryptIn))),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: b})}},
			InPublic: tpm2.New2B(credentialTemplate(digest)),
		})
	})
	return err
}

// parseCredential reads the file of a sealed credential. It proves that the file holds
// an object of the kind that Seal makes, bound to the PCR value in the same
// file.
func parseCredential(blob []byte) (*sealedCredential, error) {
	c := &sealedCredential{}
	digest, err := c.parse(credentialKind, blob, c)
	if err != nil {
		return nil, err
	}
	if sum, ok := strings.CutPrefix(c.EK, "sha256:"); !ok || len(sum) != 2*crypto.SHA256.Size() || strings.ToLower(sum) != sum {
		return nil, credentialKind.damaged("%+.40q is not a digest of an endorsement key", c.EK)
	} else if _, err := hex.DecodeString(sum); err != nil {
		return nil, credentialKind.damaged("digest of the endorsement key: %w", err)
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](c.Public)
	if err != nil {
		return nil, credentialKind.damaged("public area: %w", err)
	}
	want := credentialTemplate(digest)
	want.Unique = public.Unique
	if id, err := public.Unique.KeyedHash(); err != nil || len(id.Buffer) != crypto.SHA256.Size() || !bytes.Equal(tpm2.Marshal(want), c.Public) {
		return nil, credentialKind.damaged("the object is of another kind, or its authorization policy is not that of its PCR 7")
	}
	return c, nil
}

// Unseal returns the credential that Seal sealed in blob, in locked
// memory. The error is [seal.CauseBootState] if Secure Boot's state or keys have
// changed, [seal.CauseOtherTPM] on another TPM, [seal.CauseTPMCleared] after
// TPM2_Clear, and [seal.CauseCredentials] for a file that no TPM can open.
func Unseal(ctx context.Context, d *device.Device, owner keys.Owner, mem seal.Memory, blob []byte) (credential *seal.Secret, err error) {
	c, err := parseCredential(blob)
	if err != nil {
		return nil, err
	}
	defer seal.Collect() // the TPM's answer, as go-tpm unmarshalled it
	err = useBound(ctx, d, owner, &c.bound, credentialKind, func(t transport.TPM, object tpm2.NamedHandle, session tpm2.Session) (err error) {
		credential, err = keys.Unseal(t, object, session, mem, func(n int) error {
			if n == 0 || n > Max {
				return credentialKind.damaged("it holds %d bytes, want 1 to %d", n, Max)
			}
			return nil
		})
		return err
	}, tpm2.AESEncryption(128, tpm2.EncryptOut))
	switch {
	case errors.Is(err, keys.ErrOtherSRK):
		return nil, device.Classify(d.Do(ctx, c.otherTPM))
	case errors.Is(err, authpolicy.ErrBootState):
		return nil, seal.Errorf(seal.CauseBootState, "boot as before, or "+hintCredential,
			"Secure Boot's state or keys have changed since the credential was sealed, which is bound to PCR 7: %w", err)
	case err != nil:
		return nil, device.Classify(err)
	}
	return credential, nil
}

// otherTPM distinguishes a cleared TPM from another TPM.
func (c *sealedCredential) otherTPM(t transport.TPM) error {
	now, err := keys.EKDigest(t)
	switch {
	case err != nil:
		return err
	case now == c.EK:
		return seal.Errorf(seal.CauseTPMCleared, hintCredential, "this TPM was cleared after the credential was sealed: %w", keys.ErrOtherSRK)
	}
	return seal.Errorf(seal.CauseOtherTPM, "put the disk back into its machine, or "+hintCredential,
		"the credential was sealed by another TPM: its endorsement key is %.19s…, this one's is %.19s…: %w", c.EK, now, keys.ErrOtherSRK)
}
