package members

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/tpm/attest"
)

// Identity holds the facts that an operator needs in order to approve a machine.
type Identity struct {
	Node string `json:"node"`
	// EK is the digest of the endorsement key, which the operator approves.
	EK string `json:"ek"`
	// SRK is the SHA-256 of the storage root key's public area.
	SRK        string `json:"srk"`
	EpochIndex uint32 `json:"epochIndex"`
	// Boot is the way in which the machine booted. PCRs are the values that it would
	// seal to, quoted and explained by the event log.
	Boot string         `json:"boot"`
	Bank string         `json:"bank"`
	PCRs map[int]string `json:"pcrs"`
}

// Identify describes this machine. It needs no keyring, and changes nothing.
func Identify(ctx context.Context, n *node.Node) (*Identity, error) {
	self, err := n.TPM.Self(ctx)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	pcrs, err := n.Gate.ChoosePCRs()
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	pcrs = slices.Sorted(slices.Values(pcrs))
	unjudged := attest.Gate{Attester: n.Gate.Attester, Bank: n.Gate.Bank}
	r, err := unjudged.AttestPCRs(ctx, pcrs)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	id := &Identity{Node: self.Node, EK: self.EK, SRK: digest(self.SRK), EpochIndex: self.Epoch.Index(), Boot: string(r.Log.BootType()), Bank: n.Config.TPM.Bank, PCRs: map[int]string{}}
	for _, i := range pcrs {
		id.PCRs[i] = hex.EncodeToString(r.PCRs[i])
	}
	return id, nil
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}
