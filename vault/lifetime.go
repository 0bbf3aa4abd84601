package vault

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/client"
)

// Lifetime is what the server reports about the token in auth.tokenFile.
type Lifetime struct {
	// Invalid says that the server does not know the token, or no longer.
	Invalid bool
	// Ends is when the token ends, or zero if it never does. It lives for Lives after it was
	// made or renewed.
	Ends      time.Time
	Lives     time.Duration
	Renewable bool
	// Uses is how many uses are left, or 0 if they are not limited. The question is one.
	Uses int
}

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
	var parsed struct {
		Data *struct {
			ExpireTime  *time.Time `json:"expire_time"`
			CreationTTL int64      `json:"creation_ttl"` // seconds
			Renewable   bool       `json:"renewable"`
			NumUses     int        `json:"num_uses"`
		} `json:"data"`
	}
	if err := json.Unmarshal(answer, &parsed); err != nil || parsed.Data == nil {
		return Lifetime{}, s.config.errorf(seal.CauseUnavailable, hintNotVault, "%s: %w", r.Path, ErrNotVault)
	}
	d := parsed.Data
	l := Lifetime{Lives: time.Duration(d.CreationTTL) * time.Second, Renewable: d.Renewable, Uses: d.NumUses}
	if d.ExpireTime != nil {
		l.Ends = *d.ExpireTime
	}
	return l, nil
}
