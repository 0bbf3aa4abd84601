package remote

import (
	"context"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm"
)

// Gate asks the verifier that this node is configured with.
type Gate struct {
	Node    string
	Logs    func() (firmware, userspace []byte, err error)
	Channel Channel
}

// Ask is for [tpm.Config]. The cluster is what the slot names; the verifier knows
// its own.
func (g *Gate) Ask(ctx context.Context, t transport.TPM, srk *tpm.SRK, v tpm.Verifier, nonceTPM []byte) (tpm2.TPMTSignature, error) {
	a := Attester{Cluster: v.Cluster, Node: g.Node, Logs: g.Logs, Channel: g.Channel}
	return a.Sign(ctx, t, srk, nonceTPM)
}
