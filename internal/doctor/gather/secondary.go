package gather

import (
	"context"

	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/doctor/credential"
	"github.com/beezy-dev/kleidi/internal/node"
)

// token reads what the token reports without a login, so it costs no try of the PIN.
func token(ctx context.Context, n *node.Node) doctor.Known[credential.Token] {
	if n.HSM == nil {
		return doctor.Known[credential.Token]{}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	p, err := n.HSM.PIN(ctx)
	return known(credential.Token{Module: p.Module, Label: p.TokenLabel, Locked: p.Locked, FinalTry: p.FinalTry, CountLow: p.CountLow}, err)
}

// vaultToken asks the server about the token in a file. The other ways to log in have no such
// token, and a login with a secret ID could spend it.
func vaultToken(ctx context.Context, n *node.Node) doctor.Known[credential.VaultToken] {
	if n.Vault == nil || n.Config.Vault.Auth.TokenFile == "" {
		return doctor.Known[credential.VaultToken]{}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	l, err := n.Vault.Lifetime(ctx)
	return known(credential.VaultToken{Invalid: l.Invalid, Ends: l.Ends, Lives: l.Lives, Renewable: l.Renewable, Uses: l.Uses}, err)
}
