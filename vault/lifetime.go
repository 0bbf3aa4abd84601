package vault

import (
	"context"
	"errors"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/client"
	"github.com/beezy-dev/kleidi/vault/internal/lifetime"
)

// Lifetime is what the server reports about the token in auth.tokenFile.
type Lifetime = lifetime.Lifetime

// Lifetime asks the server about the token in auth.tokenFile. It fails if kleidi logs in in
// another way: a login would spend what this question is to protect.
func (w *Wrapper) Lifetime(ctx context.Context) (l Lifetime, err error) {
	if w.config.Auth.Method != MethodToken {
		return l, errors.New("vault: kleidi logs in with something other than a token")
	}
	err = w.withSession(ctx, func(ctx context.Context, s *session) error {
		l, err = s.lifetime(ctx)
		return err
	})
	if errors.Is(err, ErrToken) {
		return Lifetime{Invalid: true}, nil
	}
	return l, err
}

func (s *session) lifetime(ctx context.Context) (Lifetime, error) {
	r := client.Request{Path: "auth/token/lookup-self", Capability: "read"}
	answer, err := s.Call(ctx, r)
	if err != nil {
		return Lifetime{}, s.explain(ctx, r, err)
	}
	l, err := lifetime.Parse(answer)
	if err != nil {
		return l, s.config.errorf(seal.CauseUnavailable, hintNotVault, "%s: %w", r.Path, ErrNotVault)
	}
	return l, nil
}
