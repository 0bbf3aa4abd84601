package exchange

import (
	"encoding/hex"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
)

// Verdict is the result of one exchange, or of several that were refused for the same
// reason before the peer had proven anything. It is a line of the audit log.
type Verdict struct {
	Time time.Time `json:"time"`
	// Since is the time of the first of Count refusals, and Time that of the last.
	Since    time.Time `json:"since,omitzero"`
	Count    int       `json:"count,omitempty"`
	Peer     string    `json:"peer"`
	Node     string    `json:"node"` // as claimed, until Accepted
	EK       string    `json:"ek"`   // as claimed, until Accepted
	Accepted bool      `json:"accepted"`
	// Check and Reason say what is wrong, and Hint what to do next.
	Check  string `json:"check,omitempty"`
	Reason string `json:"reason,omitempty"`
	Hint   string `json:"hint,omitempty"`
	// Finding is more about a proof that did not verify. The peer does not learn it.
	Finding string `json:"finding,omitempty"`
	// Bank and PCRs are the quoted values, by index, of accepted evidence.
	Bank string         `json:"bank,omitempty"`
	PCRs map[int]string `json:"pcrs,omitempty"`
	// Session is the signed nonce of the policy session, in hexadecimal.
	Session string `json:"session,omitempty"`
	// Join holds the facts of a join.
	Join *JoinVerdict `json:"join,omitempty"`
}

// JoinVerdict holds the audit log's facts of a join, in addition to the evidence.
type JoinVerdict struct {
	// Step is the outcome; see the constants of package join.
	Step string `json:"step"`
	// KeyID and Revision are those of the keyring that the node receives.
	KeyID    seal.KeyID `json:"keyID"`
	Revision uint64     `json:"revision"`
	// BootPolicy is the SHA-256 of the boot policy that judged the boot.
	BootPolicy string `json:"bootPolicy,omitempty"`
	// Files are the names of the bootstrap files that go with the keyring.
	Files []string `json:"files,omitempty"`
}

// Accept copies the facts from accepted evidence.
func (v *Verdict) Accept(r *attest.Result) {
	v.Accepted, v.Bank, v.PCRs = true, bankNames[r.Bank], map[int]string{}
	for i, value := range r.PCRs {
		v.PCRs[i] = hex.EncodeToString(value)
	}
}
