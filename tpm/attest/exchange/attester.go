package exchange

import (
	"crypto"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Logs returns the logs that explain quoted PCRs: [attest.Logs.Explaining], or a test's
// function.
type Logs func(bank crypto.Hash, quoted eventlog.PCRs) (firmware, userspace []byte, err error)

// Machine is the open TPM on the attester's side, with the keys loaded in it.
type Machine struct {
	TPM transport.TPM
	SRK *keys.SRK
	AK  *keys.AK
	EK  *keys.EK
}

// WithMachine loads an attestation key and the endorsement key beside srk for f.
func WithMachine(t transport.TPM, srk *keys.SRK, f func(*Machine) error) error {
	return keys.WithAK(t, srk, func(ak *keys.AK) error {
		return keys.WithEK(t, func(ek *keys.EK) error { return f(&Machine{t, srk, ak, ek}) })
	})
}

// Claims returns the machine's claims about itself. The purpose adds its context.
func (m *Machine) Claims(cluster seal.ClusterID, node string) Claims {
	return Claims{Cluster: cluster[:], Node: node, EK: m.EK.SPKI, EKCertificate: keys.EKCertificate(m.TPM, m.EK), AK: m.AK.Public, SRK: m.SRK.Name.Buffer}
}

// Respond answers a challenge that has passed Check, on the TLS connection with that
// exporter value. It also returns the digest of the transcript.
func (p Purpose) Respond(m *Machine, c *Claims, challenge *Challenge, exporter []byte, logs Logs) (e *Evidence, digest []byte, err error) {
	digest = p.Digest(&Transcript{Cluster: seal.ClusterID(c.Cluster), Node: c.Node, Nonce: challenge.Nonce, Exporter: exporter, Context: c.Context,
		EK: c.EK, AK: m.AK.Name.Buffer, SRK: c.SRK})
	secret, err := m.EK.Activate(m.TPM, m.SRK, m.AK, challenge.Credential, challenge.Secret)
	if err != nil {
		return nil, nil, err
	}
	defer clear(secret)
	q, err := m.AK.Quote(m.TPM, digest, challenge.Bank, challenge.PCRs)
	if err != nil {
		return nil, nil, err
	}
	// The logs are read after the quote. An event in between then appears as a replay
	// that does not match; in the other order, a log without the event could match.
	firmware, userspace, err := logs(challenge.Bank, q.PCRs)
	if err != nil {
		return nil, nil, err
	}
	return &Evidence{Proof: p.Answer(secret, digest), Attest: q.Attest, Signature: q.Signature, PCRs: q.PCRs, FirmwareLog: firmware, UserspaceLog: userspace}, digest, nil
}
