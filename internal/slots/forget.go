package slots

import (
	"context"
	"fmt"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
)

// ForgetCopies ends the debts of a TPM that, according to the operator, was cleared or
// destroyed.
func ForgetCopies(ctx context.Context, n *node.Node, req admin.ForgetCopiesRequest) (admin.KeyringState, error) {
	forgotten, err := reseal.Forget(ctx, n, func(d slotview.Debt) bool { return d.EK == req.EK })
	if err == nil && len(forgotten) == 0 {
		err = fmt.Errorf("the keyring names no kept copies that open with the TPM of endorsement key %q; see kleidi status", req.EK)
	}
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("slot forget-copies: %w", err)
	}
	var changes []string
	for _, d := range forgotten {
		changes = append(changes, "forgotten, on your authority alone: copies that "+d.Describe())
	}
	return n.Unchanged(changes...)
}
