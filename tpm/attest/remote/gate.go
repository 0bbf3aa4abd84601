package remote

import (
	"context"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Gate asks the configured verifier of this node.
type Gate struct {
	Node    string
	Logs    Logs
	Channel Channel
}

// Ask is for [tpm.Config]. The slot names the cluster, and the verifier knows its own.
func (g *Gate) Ask(ctx context.Context, t transport.TPM, srk *keys.SRK, v tpm.Verifier, nonceTPM []byte) (tpm2.TPMTSignature, error) {
	key, err := authpolicy.Name(v.Key)
	if err != nil {
		return tpm2.TPMTSignature{}, err
	}
	a := Attester{Cluster: v.Cluster, Node: g.Node, Key: key, Logs: g.Logs, Channel: g.Channel}
	return a.Sign(ctx, t, srk, nonceTPM)
}
