package kube

import (
	"context"
	"fmt"
	"net/http"
	"net/url"

	"github.com/beezy-dev/kleidi/seal/store"
)

const archives = "/apis/" + APIVersion + "/keyringarchives"

// Archive returns the archive of a pruned KEK. The error is fs.ErrNotExist if there is none.
func (s *Store) Archive(ctx context.Context, keyID string) ([]byte, error) {
	var o object
	if err := s.get(ctx, archives+"/"+url.PathEscape(keyID), &o); err != nil {
		return nil, fmt.Errorf("read KeyringArchive %s: %w", keyID, err)
	}
	return o.Spec.KEK, nil
}

// CreateArchive stores the archive of a KEK. The error is [store.ErrConflict] if there is one
// already: an archive is never replaced.
func (s *Store) CreateArchive(ctx context.Context, keyID string, archive []byte) error {
	o := object{APIVersion, "KeyringArchive", metadata{Name: keyID}, spec{KEK: archive}}
	err := s.Do(ctx, http.MethodPost, archives, JSON, o, nil)
	if Refused(err, http.StatusConflict) {
		err = store.ErrConflict
	}
	if err != nil {
		return fmt.Errorf("create KeyringArchive %s: %w", keyID, err)
	}
	return nil
}
