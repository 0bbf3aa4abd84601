package remote

import (
	"context"
	"crypto"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Channel leads to the verifier, see package grpcserver/verifier.
type Channel interface {
	// Attest is one exchange: it sends hello, sends what answer makes of the
	// challenge and of the connection's exporter value, and returns the signature,
	// a TPMT_SIGNATURE. An error of answer is returned as it is, every other is a
	// [*seal.Error].
	Attest(ctx context.Context, hello *Hello, answer func(c *Challenge, exporter []byte) (*Evidence, error)) (signature []byte, err error)
}

// Logs is [attest.Logs.Explaining], or a test's.
type Logs func(bank crypto.Hash, quoted eventlog.PCRs) (firmware, userspace []byte, err error)

// Attester asks the verifier on behalf of the machine that it runs on.
type Attester struct {
	Cluster seal.ClusterID
	Node    string
	// Key is the Name of the verifier's key that the slot demands.
	Key []byte
	// Logs returns the bytes of both event logs that explain quoted PCRs, the second
	// empty if there is none.
	Logs    Logs
	Channel Channel
}

// Sign has the verifier sign for a policy session that is open on t, of which
// nonceTPM is the nonce. srk is the storage root key that the slot hangs from.
//
// It takes no more than a TPM must have, three objects and three sessions: srk
// and the policy session are there already, the attestation key and the
// endorsement key come to it, and one session at a time. So nothing else may be
// loaded, and the object that is to be unsealed is loaded afterwards.
func (a *Attester) Sign(ctx context.Context, t transport.TPM, srk *tpm.SRK, nonceTPM []byte) (tpm2.TPMTSignature, error) {
	var signature []byte
	err := tpm.WithAK(t, srk, func(ak *tpm.AK) error {
		return tpm.WithEK(t, func(ek *tpm.EK) (err error) {
			signature, err = a.exchange(ctx, &machine{t, srk, ak, ek}, nonceTPM)
			return err
		})
	})
	if err != nil {
		return tpm2.TPMTSignature{}, err
	}
	s, err := tpm2.Unmarshal[tpm2.TPMTSignature](signature)
	if err != nil {
		return tpm2.TPMTSignature{}, seal.Errorf(seal.CauseUnavailable, "see that tpm.verifier.address leads to kleidi verifier", "the verifier's signature: %w", err)
	}
	return *s, nil
}

// machine is what is open and loaded while the verifier is asked.
type machine struct {
	t   transport.TPM
	srk *tpm.SRK
	ak  *tpm.AK
	ek  *tpm.EK
}

func (a *Attester) exchange(ctx context.Context, m *machine, nonceTPM []byte) ([]byte, error) {
	hello := &Hello{Cluster: a.Cluster[:], Node: a.Node, EK: m.ek.SPKI, EKCertificate: tpm.EKCertificate(m.t, m.ek),
		AK: m.ak.Public, SRK: m.srk.Name.Buffer, NonceTPM: nonceTPM, Key: a.Key}
	if err := hello.check(); err != nil {
		return nil, fmt.Errorf("remote gate: %w", err)
	}
	return a.Channel.Attest(ctx, hello, func(c *Challenge, exporter []byte) (*Evidence, error) { return a.answer(m, hello, c, exporter) })
}

func (a *Attester) answer(m *machine, h *Hello, c *Challenge, exporter []byte) (*Evidence, error) {
	if err := c.check(); err != nil {
		return nil, seal.Errorf(seal.CauseUnavailable, "see that tpm.verifier.address leads to kleidi verifier of this version", "the verifier's challenge: %w", err)
	}
	t := &Transcript{Cluster: a.Cluster, Node: h.Node, Nonce: c.Nonce, Exporter: exporter, NonceTPM: h.NonceTPM, EK: h.EK, AK: m.ak.Name.Buffer, SRK: h.SRK}
	digest := t.Digest()
	secret, err := m.ek.Activate(m.t, m.srk, m.ak, c.Credential, c.Secret)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	q, err := m.ak.Quote(m.t, digest, c.Bank, c.PCRs)
	if err != nil {
		return nil, err
	}
	// After the quote: an event that came in between then shows as a replay that
	// does not fit, never as one that fits by leaving it out.
	firmware, userspace, err := a.Logs(c.Bank, q.PCRs)
	if err != nil {
		return nil, err
	}
	return &Evidence{Proof: proof(secret, digest), Attest: q.Attest, Signature: q.Signature, PCRs: q.PCRs, FirmwareLog: firmware, UserspaceLog: userspace}, nil
}
