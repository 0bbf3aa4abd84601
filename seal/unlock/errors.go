package unlock

import "github.com/beezy-dev/kleidi/seal"

func storeError(what string, err error) error {
	if seal.CauseOf(err) != "" {
		return err
	}
	return seal.Errorf(seal.CauseStore, "see the state folder's disk and permissions", "%s: %w", what, err)
}
