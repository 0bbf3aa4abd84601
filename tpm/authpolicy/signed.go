package authpolicy

import (
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// NonceSize is the size in bytes of the nonces of a session that satisfies
// terms: its nonceTPM has the size of the caller's.
const NonceSize = 16

// Signed is the condition that the holder of a key agrees to this very session:
// TPM2_PolicySigned without expiration, for any command.
type Signed struct {
	// Key is the signer's public key, made by [PublicKey].
	Key tpm2.TPMTPublic
	// Ref is signed too and separates the purposes of one key: 0 to 32 bytes.
	Ref []byte
	// Sign asks the signer to sign the [SignedHash] of nonceTPM and Ref; nil means that
	// no signer can be asked. The TPM stays open while Sign runs.
	Sign func(nonceTPM []byte) (tpm2.TPMTSignature, error)

	signature tpm2.TPMTSignature // what Sign returned, see Terms.ask
}

// SignedHash returns the SHA-256 hash that a [Signed] signer signs: the aHash of
// TPM2_PolicySigned, over the session's nonceTPM, no expiration, no command, and ref.
//
// It refuses a nonce that does not have [NonceSize] bytes. A TPM accepts a signature over an
// empty nonce in every session, forever; a signature over 32 bytes could be taken for a
// signed boot state.
func SignedHash(nonceTPM, ref []byte) ([]byte, error) {
	if len(nonceTPM) != NonceSize {
		return nil, fmt.Errorf("a session nonce of %d bytes, want %d", len(nonceTPM), NonceSize)
	}
	if err := checkRef(ref); err != nil {
		return nil, err
	}
	return hash(nonceTPM, make([]byte, 4), ref), nil // 4: expiration, an int32
}

func (s Signed) extend(calc *tpm2.PolicyCalculator) error {
	if err := checkRef(s.Ref); err != nil {
		return err
	}
	name, err := Name(s.Key)
	if err != nil {
		return err
	}
	return tpm2.PolicySigned{
		AuthObject: tpm2.NamedHandle{Name: tpm2.TPM2BName{Buffer: name}},
		PolicyRef:  tpm2.TPM2BNonce{Buffer: s.Ref},
	}.Update(calc)
}

func (s Signed) satisfy(t transport.TPM, session tpm2.Session) error {
	return withKey(t, s.Key, func(key tpm2.NamedHandle) error {
		_, err := tpm2.PolicySigned{
			AuthObject: key, PolicySession: session.Handle(), NonceTPM: session.NonceTPM(),
			PolicyRef: tpm2.TPM2BNonce{Buffer: s.Ref}, Auth: s.signature,
		}.Execute(t)
		if err != nil {
			return signatureError("TPM2_PolicySigned", err)
		}
		return nil
	})
}
