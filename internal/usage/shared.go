package usage

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
)

// keyringKey is the key of kleidi's shared keyring, below kube-apiserver's prefix.
const keyringKey = "/kleidi.beezy.dev/keyrings/cluster"

// SharedKeyring returns the keyring that kleidi's nodes shared in the cluster's API when the
// snapshot was taken.
func (r *Report) SharedKeyring() ([]byte, error) {
	if r.keyring == nil {
		return nil, &seal.Error{Err: fmt.Errorf("snapshot %s holds no keyring of kleidi: the nodes shared none", r.Source), Hint: "look for a copy that kleidi keyring backup FILE has written"}
	}
	var object struct {
		Spec struct{ Keyring []byte }
	}
	if err := json.Unmarshal(r.keyring, &object); err != nil || len(object.Spec.Keyring) == 0 {
		return nil, errors.New("snapshot " + r.Source + ": the keyring in it is encrypted, or not in a form that kleidi knows")
	}
	return object.Spec.Keyring, nil
}
