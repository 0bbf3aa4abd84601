package node

import (
	"fmt"

	"github.com/beezy-dev/kleidi/grpcserver/verifier"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

// RemoteGate is the node's view of the configured verifier; nil if there is none.
type RemoteGate struct {
	*remote.Gate
	publicKey string
}

// DemandUnless is Demand, but returns nil if the operator goes on without the verifier.
func (g *RemoteGate) DemandUnless(without bool, cluster seal.ClusterID) (*tpm.Verifier, error) {
	if without {
		return nil, nil
	}
	return g.Demand(cluster)
}

// Demand returns what new slots of a cluster demand of the verifier; nil if there is no
// verifier.
func (g *RemoteGate) Demand(cluster seal.ClusterID) (*tpm.Verifier, error) {
	if g == nil {
		return nil, nil
	}
	b, err := files.ReadOwned(g.publicKey, files.MaxPublicKey)
	if err != nil {
		return nil, fmt.Errorf("tpm.verifier.publicKey: %w", err)
	}
	public, err := bootstate.ParsePublicKey(b)
	if err != nil {
		return nil, fmt.Errorf("tpm.verifier.publicKey: %s: %w", g.publicKey, err)
	}
	key, err := authpolicy.PublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("tpm.verifier.publicKey: %s: %w", g.publicKey, err)
	}
	return &tpm.Verifier{Signer: tpm.Signer{Key: key, Ref: remote.PolicyRef(cluster, g.Node)}, Cluster: cluster}, nil
}

func newRemoteGate(cfg *config.Config, logs remote.Logs) (*RemoteGate, error) {
	v := cfg.TPM.Verifier
	if v.Address == "" {
		return nil, nil
	}
	channel, err := verifier.NewClient(verifier.ClientConfig{
		Address: v.Address, Certificate: v.Certificate, CAFile: v.CAFile, ServerName: v.ServerName, Timeout: v.Timeout,
	})
	if err != nil {
		return nil, fmt.Errorf("tpm.verifier: %w", err)
	}
	return &RemoteGate{&remote.Gate{Node: cfg.Node, Logs: logs, Channel: channel}, v.PublicKey}, nil
}
