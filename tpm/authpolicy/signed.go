package authpolicy

import (
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// NonceSize is the size in bytes of the nonces of a session that satisfies
// terms: its nonceTPM has the size of the caller's.
const NonceSize = 16

// Signed is the condition that the holder of a key agrees now, to this very
// session: TPM2_PolicySigned without expiration, and for any command.
type Signed struct {
	// Key is the signer's public key, made by [PublicKey].
	Key tpm2.TPMTPublic
	// Ref is signed too and tells apart what the signer agrees to: 0 to 32 bytes.
	Ref []byte
	// Sign asks the signer for the signature of [SignedHash] of nonceTPM and Ref.
	// nil is a signer that cannot be asked. The TPM is open while it runs.
	Sign func(nonceTPM []byte) (tpm2.TPMTSignature, error)
}

// SignedHash returns the SHA-256 hash that a [Signed] signer signs (aHash of
// TPM2_PolicySigned): of the session's nonceTPM, of no expiration, no command
// and ref.
//
// A nonce of another size than [NonceSize] is refused. A TPM accepts a signature
// over an empty one in every session and for ever; one over 32 bytes could be
// read as a signed boot state.
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
	if err := checkRef(s.Ref); err != nil {
		return err
	}
	if s.Sign == nil {
		return fmt.Errorf("%w: there is no signer to ask", ErrSignature)
	}
	nonce := session.NonceTPM()
	signature, err := s.Sign(nonce.Buffer)
	if err != nil {
		return err
	}
	if err := checkSignature(signature); err != nil {
		return fmt.Errorf("%w: %w", ErrSignature, err)
	}
	return withKey(t, s.Key, func(key tpm2.NamedHandle) error {
		_, err := tpm2.PolicySigned{
			AuthObject: key, PolicySession: session.Handle(), NonceTPM: nonce,
			PolicyRef: tpm2.TPM2BNonce{Buffer: s.Ref}, Auth: signature,
		}.Execute(t)
		if err != nil {
			return signatureError("TPM2_PolicySigned", err)
		}
		return nil
	})
}
