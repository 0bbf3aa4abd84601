package exchange

import (
	"crypto/hmac"
	"sync"

	"github.com/google/go-tpm/tpm2"
)

// Finding says why a proof did not verify, as far as the verifier can tell. It is for the
// verifier's own log and audit log. The other side learns only that the proof failed,
// because somebody who intercepts the connection would read more.
type Finding string

// The findings.
const (
	// FindingReplay: the answer is the right one of an earlier exchange.
	FindingReplay Finding = "the answer was recorded in an earlier exchange"
	// FindingStaleNonce: the TPM answered to a challenge with the nonce of an earlier exchange.
	// It is the right TPM: only the one with the endorsement key knows the present secret.
	FindingStaleNonce Finding = "the right TPM answered to the nonce of an earlier exchange: somebody altered the challenge on the way"
	// FindingOtherTranscript: the same, and the TPM's side saw another TLS connection, or
	// another hello or challenge. The transcript is a hash, so it does not say which.
	FindingOtherTranscript Finding = "the right TPM answered, and saw another exchange than this one: somebody relays the connection, or altered a message on the way"
	// FindingNoSecret: nothing shows that the TPM with the endorsement key took part.
	FindingNoSecret Finding = "the answer was made without the secret that only the right TPM can read"
)

// recentMax bounds the exchanges that a verifier remembers. Many exchanges make it forget
// an earlier one; a finding is then a less exact one.
const recentMax = 256

// Recent holds the last exchanges of a verifier, none of their secrets. Its methods may be
// called concurrently. The zero value is ready.
type Recent struct {
	mu   sync.Mutex
	next int
	all  []recent
}

type recent struct{ nonce, answer []byte }

// Add remembers an exchange.
func (r *Recent) Add(p *Pending) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := recent{p.transcript.Nonce, p.purpose.Answer(p.secret, p.digest)}
	if len(r.all) < recentMax {
		r.all = append(r.all, e)
		return
	}
	r.all[r.next] = e
	r.next = (r.next + 1) % recentMax
}

// Find says why the proof in e did not verify in the exchange p. Nothing depends on the
// finding: the exchange has already failed.
func (r *Recent) Find(p *Pending, e *Evidence) Finding {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, former := range r.all {
		if hmac.Equal(former.answer, e.Proof) {
			return FindingReplay
		}
	}
	for _, former := range r.all {
		other := p.transcript
		other.Nonce = former.nonce
		if hmac.Equal(p.purpose.Answer(p.secret, p.purpose.Digest(&other)), e.Proof) {
			return FindingStaleNonce
		}
	}
	// The node's quote names the transcript that its proof covers.
	if a, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Attest); err == nil && hmac.Equal(p.purpose.Answer(p.secret, a.ExtraData.Buffer), e.Proof) {
		return FindingOtherTranscript
	}
	return FindingNoSecret
}
