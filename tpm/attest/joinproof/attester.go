package joinproof

import (
	"context"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Attester proves for the machine that it runs on.
type Attester struct {
	Device *device.Device
	Owner  keys.Owner
	Logs   exchange.Logs
}

// Prove makes a hello, passes it to begin, which sends it, and answers the challenge that
// begin returns together with the TLS connection's exporter value. The TPM stays open
// meanwhile. Prove also returns the digest of the transcript, which the last message of
// the join repeats.
func (a *Attester) Prove(ctx context.Context, cluster seal.ClusterID, node string, terms Terms, begin func(*Hello) (c *exchange.Challenge, exporter []byte, err error)) (e *exchange.Evidence, transcript []byte, err error) {
	err = a.Device.Do(ctx, func(t transport.TPM) error {
		return keys.WithSRK(t, a.Owner, nil, func(srk *keys.SRK) error {
			return exchange.WithMachine(t, srk, func(m *exchange.Machine) error {
				hello, err := NewHello(m, cluster, node, terms)
				if err != nil {
					return err
				}
				challenge, exporter, err := begin(hello)
				if err != nil {
					return err
				}
				e, transcript, err = Respond(m, hello, challenge, exporter, a.Logs)
				return err
			})
		})
	})
	return e, transcript, err
}

// VerifierKey returns a remote verifier's key in the form that [Terms] has; nil means
// no verifier.
func VerifierKey(v *tpm.Verifier) []byte {
	if v == nil {
		return nil
	}
	return tpm2.Marshal(v.Key)
}
