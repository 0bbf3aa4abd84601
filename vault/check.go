package vault

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/client"
)

// keySettings are the settings of a Transit key.
type keySettings struct {
	Type                 string `json:"type"`
	LatestVersion        int    `json:"latest_version"`
	MinDecryptionVersion int    `json:"min_decryption_version"`
	DeletionAllowed      bool   `json:"deletion_allowed"`
	Exportable           bool   `json:"exportable"`
	PlaintextBackup      bool   `json:"allow_plaintext_backup"`
	Derived              bool   `json:"derived"`
}

// Check finds settings of the Transit key that can keep the slot from opening some day, or
// that let others open it. It returns a warning for each: a sentence that ends in a
// remedy. Check does not open the slot. It needs the capability read on the key, which
// wrapping and unwrapping don't need. Without that capability, a warning asks for it, and
// the settings of the key are not checked.
func (w *Wrapper) Check(ctx context.Context, slot seal.Slot) (warnings []string, err error) {
	if _, err := w.config.ciphertext(slot); err != nil {
		return nil, err
	}
	v, err := Version(slot)
	if err != nil {
		return nil, err
	}
	err = w.withSession(ctx, func(ctx context.Context, s *session) error {
		warnings, err = s.check(ctx, w.path("keys"), v)
		if err != nil {
			return err
		}
		capabilities, err := s.capabilities(ctx, w.path("encrypt"))
		if err == nil && (slices.Contains(capabilities, "create") || slices.Contains(capabilities, "root")) {
			warnings = append(warnings, fmt.Sprintf("the token can create a Transit key if %s is missing; "+
				"take the capability create on %s away from it", w.config.Key, w.path("encrypt")))
		}
		return nil
	})
	return warnings, err
}

func (s *session) check(ctx context.Context, path string, version int) ([]string, error) {
	r := client.Request{Path: path, Capability: "read"}
	answer, err := s.Call(ctx, r)
	if forbidden(err) {
		if _, err := s.capabilities(ctx, path); err != nil {
			return nil, s.explain(ctx, r, err)
		}
		return []string{fmt.Sprintf("kleidi may not read the settings of the Transit key; grant the capability read on %s", path)}, nil
	}
	if err != nil {
		return nil, s.explain(ctx, r, err)
	}
	var parsed struct {
		Data keySettings `json:"data"`
	}
	if err := json.Unmarshal(answer, &parsed); err != nil || parsed.Data.LatestVersion == 0 {
		return nil, s.config.errorf(seal.CauseUnavailable, hintNotVault, "%s: %w", path, ErrNotVault)
	}
	return parsed.Data.warnings(path, version), nil
}

func (k keySettings) warnings(path string, version int) (all []string) {
	add := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	switch {
	case version > k.LatestVersion:
		add("the slot has version %d of the Transit key, but the newest version is %d, so this is another key of the same name; "+
			"restore the key from a backup of the server", version, k.LatestVersion)
	case version < k.MinDecryptionVersion:
		add("the slot has version %d of the Transit key, but min_decryption_version is %d, so the slot doesn't open; "+
			"run vault write %s/config min_decryption_version=%d, then kleidi slot rewrap NAME", version, k.MinDecryptionVersion, path, version)
	case version < k.LatestVersion:
		add("the slot has version %d of the Transit key, and the newest version is %d; "+
			"run kleidi slot rewrap NAME before you raise min_decryption_version", version, k.LatestVersion)
	}
	if k.DeletionAllowed {
		add("the Transit key can be deleted; run vault write %s/config deletion_allowed=false", path)
	}
	if k.Exportable || k.PlaintextBackup {
		add("the Transit key can leave the server (exportable or allow_plaintext_backup), which can't be undone; " +
			"make another key, and wrap with that one")
	}
	if k.Derived {
		add("the Transit key needs a context, which kleidi doesn't send; make a key that is not derived, and wrap with that one")
	}
	return all
}

// capabilities returns the capabilities of the session's token on a path.
func (s *session) capabilities(ctx context.Context, path string) ([]string, error) {
	body, err := json.Marshal(map[string][]string{"paths": {path}})
	if err != nil {
		return nil, err
	}
	answer, err := s.Call(ctx, client.Request{Path: "sys/capabilities-self", Body: body})
	if err != nil {
		return nil, err
	}
	var parsed struct {
		Data struct {
			Capabilities []string `json:"capabilities"`
		} `json:"data"`
	}
	err = json.Unmarshal(answer, &parsed)
	return parsed.Data.Capabilities, err
}
