package tpm

import (
	"context"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Self describes this machine's TPM, as a node's entry in the keyring does.
func (w *Wrapper) Self(ctx context.Context) (p Peer, err error) {
	p.Node, p.Epoch = w.Node, w.Counter
	err = w.Device.Do(ctx, func(t transport.TPM) error {
		if p.EK, err = w.digest(t); err != nil {
			return err
		}
		return keys.WithSRK(t, w.Owner, nil, func(srk *keys.SRK) error {
			p.SRK = tpm2.Marshal(srk.Public)
			return nil
		})
	})
	return p, classify(err)
}
