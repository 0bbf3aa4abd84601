package lifecycle

import (
	"context"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// KeyRoles returns the key IDs of the keyring that the running serve holds open, or else
// of the stored keyring, which nothing has authenticated.
func KeyRoles(ctx context.Context, cfg *config.Config) (map[string]string, error) {
	roles := map[string]string{}
	if client, err := admin.Dial(ctx, cfg.Admin.Socket); err == nil {
		r, err := admin.Call(ctx, client, admin.Status, admin.StatusRequest{})
		if err != nil {
			return nil, err
		}
		for _, k := range r.Keys {
			roles[string(k.KeyID)] = k.Role
		}
		if r.CurrentKeyID != "" {
			return roles, nil
		}
	} else if !errors.Is(err, admin.ErrNotRunning) {
		return nil, err
	}
	u, _, err := ReadStored(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return RolesOf(u), nil
}

// Roles of key IDs, as in [admin.KeyReport].
const (
	roleCurrent = "current"
	roleStaged  = "staged"
	roleRetired = "retired"
)

// RolesOf returns the key IDs of a keyring.
func RolesOf(u *keyring.Untrusted) map[string]string {
	i := u.Info()
	roles := map[string]string{string(i.Current.KeyID): roleCurrent}
	if i.Staged != nil {
		roles[string(i.Staged.KeyID)] = roleStaged
	}
	for _, r := range i.Retired {
		roles[string(r.KeyID)] = roleRetired
	}
	return roles
}

// RolesIn returns the key IDs of a keyring in a file, which nothing has authenticated.
func RolesIn(file string) (map[string]string, error) {
	b, err := files.Read(file, keyring.MaxSize)
	if err != nil {
		return nil, files.HintRoot(err)
	}
	u, err := keyring.Parse(b)
	if err != nil {
		return nil, seal.WithHint(fmt.Errorf("%s: %w", file, err), "name a file that kleidi keyring backup FILE has written")
	}
	return RolesOf(u), nil
}

// CurrentOf returns the current key ID, or "".
func CurrentOf(roles map[string]string) string {
	for id, role := range roles {
		if role == roleCurrent {
			return id
		}
	}
	return ""
}
