package remote

import (
	"context"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Channel is a connection to the verifier, see package grpcserver/verifier.
type Channel interface {
	// Attest is one exchange. It sends hello, calls answer with the challenge and the
	// exporter value of the connection, sends the evidence that answer returns, and
	// returns the verifier's signature, a TPMT_SIGNATURE. An error of answer is
	// returned unchanged; every other error is a [*seal.Error].
	Attest(ctx context.Context, hello *Hello, answer func(c *Challenge, exporter []byte) (*Evidence, error)) (signature []byte, err error)
}

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

// Sign lets the verifier sign for a policy session that is open on t and has the nonce
// nonceTPM. srk is the parent of the slot's object.
//
// Every TPM must have room for three objects and three sessions, and Sign needs no
// more. The objects are srk, the attestation key and the endorsement key. The sessions
// are the policy session, the session that all commands share, and one more to prove
// the endorsement key. So nothing else may be loaded, and the caller loads the object
// to unseal afterwards.
func (a *Attester) Sign(ctx context.Context, t transport.TPM, srk *keys.SRK, nonceTPM []byte) (tpm2.TPMTSignature, error) {
	var signature []byte
	err := exchange.WithMachine(t, srk, func(m *exchange.Machine) (err error) {
		signature, err = a.exchange(ctx, m, nonceTPM)
		return err
	})
	if err != nil {
		return tpm2.TPMTSignature{}, err
	}
	s, err := tpm2.Unmarshal[tpm2.TPMTSignature](signature)
	if err != nil {
		return tpm2.TPMTSignature{}, seal.Errorf(seal.CauseUnavailable, "check that tpm.verifier.address leads to kleidi verifier", "the verifier's signature: %w", err)
	}
	return *s, nil
}

func (a *Attester) exchange(ctx context.Context, m *exchange.Machine, nonceTPM []byte) ([]byte, error) {
	c := m.Claims(a.Cluster, a.Node)
	hello := &Hello{Cluster: c.Cluster, Node: c.Node, EK: c.EK, EKCertificate: c.EKCertificate, AK: c.AK, SRK: c.SRK, NonceTPM: nonceTPM, Key: a.Key}
	if err := hello.check(); err != nil {
		return nil, fmt.Errorf("remote gate: %w", err)
	}
	return a.Channel.Attest(ctx, hello, func(c *Challenge, exporter []byte) (*Evidence, error) {
		if err := c.Check(); err != nil {
			return nil, seal.Errorf(seal.CauseUnavailable, "check that tpm.verifier.address leads to kleidi verifier of this version", "the verifier's challenge: %w", err)
		}
		e, _, err := purpose.Respond(m, hello.claims(), c, exporter, a.Logs)
		return e, err
	})
}
