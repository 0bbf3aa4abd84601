// Package lifetime reads what Vault and OpenBao say about a token.
package lifetime

import (
	"encoding/json"
	"errors"
	"time"
)

// Lifetime is what the server reports about a token.
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

// Parse parses an answer of auth/token/lookup-self.
func Parse(answer []byte) (l Lifetime, err error) {
	var parsed struct {
		Data *struct {
			ExpireTime  *time.Time `json:"expire_time"`
			CreationTTL int64      `json:"creation_ttl"` // seconds
			Renewable   bool       `json:"renewable"`
			NumUses     int        `json:"num_uses"`
		} `json:"data"`
	}
	if err := json.Unmarshal(answer, &parsed); err != nil {
		return l, err
	}
	d := parsed.Data
	if d == nil {
		return l, errors.New("it has no data")
	}
	l = Lifetime{Lives: time.Duration(d.CreationTTL) * time.Second, Renewable: d.Renewable, Uses: d.NumUses}
	if d.ExpireTime != nil {
		l.Ends = *d.ExpireTime
	}
	return l, nil
}
