package operation

import (
	"context"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
)

// resealAny dispatches a request to the reseal that it asks for.
func resealAny(ctx context.Context, n *node.Node, req admin.ResealRequest) (admin.KeyringState, error) {
	switch {
	case req.Next != nil:
		return reseal.Next(ctx, n, req)
	case req.NewTPM:
		return lifecycle.SealToNewTPM(ctx, n, req)
	default:
		return reseal.Present(ctx, n, req)
	}
}
