package prune

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// unused returns the keyring, once it is known that kube-apiserver no longer stores
// anything under the retired KEK.
func unused(ctx context.Context, n *node.Node, id seal.KeyID, records [][]byte) (*keyring.Keyring, error) {
	k, err := n.Unlocker.Keyring()
	if err == nil {
		err = checkKEK(k, id)
	}
	if err != nil {
		return nil, err
	}
	if len(k.Nodes()) == 1 {
		return k, checkEncrypted(k, unlock.LastEncrypted(n.Unlocker))
	}
	if k, err = everyNodeEncrypts(ctx, n, records); err != nil {
		return nil, err
	}
	return k, checkKEK(k, id)
}

func stateOf(n *node.Node, before *keyring.Keyring, err error, changes ...string) (admin.KeyringState, error) {
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.Result(before.CurrentID(), changes...)
}

// checkKEK refuses a KEK that is not retired, and any KEK during a rotation: the nodes
// may be about to leave the current KEK, to which the proof refers.
func checkKEK(k *keyring.Keyring, id seal.KeyID) error {
	if err := CheckRetired(k.Info(), id); err != nil {
		return err
	}
	if staged := k.StagedID(); staged != "" {
		return &seal.Error{
			Err:  fmt.Errorf("a rotation is going on, with key ID %s staged; nothing was changed", staged),
			Hint: "finish it with kleidi rotate, or end it with kleidi rotate --abort",
		}
	}
	return nil
}

// checkEncrypted refuses if kube-apiserver may still encrypt under a KEK other than the
// current one.
func checkEncrypted(k *keyring.Keyring, encrypted seal.KeyID) error {
	switch encrypted {
	case k.CurrentID():
		return nil
	case "":
		return &seal.Error{
			Err:  errors.New("kube-apiserver has not encrypted anything since kleidi serve started, so nobody knows which KEK it uses; nothing was changed"),
			Hint: "restart kube-apiserver, and run the command again",
		}
	}
	return &seal.Error{
		Err:  fmt.Errorf("kube-apiserver's last DEK seed is under %s, not under the current KEK; nothing was changed", encrypted),
		Hint: "wait three minutes after a rotation, or restart kube-apiserver; then run kleidi migrate",
	}
}

// CheckRetired refuses a key ID that does not belong to a retired KEK.
func CheckRetired(i keyring.Info, id seal.KeyID) error {
	if slices.ContainsFunc(i.Retired, func(r keyring.RetiredInfo) bool { return r.KeyID == id }) {
		return nil
	}
	return &seal.Error{Err: fmt.Errorf("key ID %s does not belong to a retired KEK; nothing was changed", seal.OneLine(string(id), 100)), Hint: "kleidi keyring show lists the retired KEKs"}
}

// NotRunning replaces Remove without a running serve, because only a running serve knows
// under which KEK kube-apiserver encrypts.
func NotRunning(context.Context, *node.Node, admin.PruneRequest) (admin.KeyringState, error) {
	return admin.KeyringState{}, errors.New("prune: kleidi serve is not running, and only it knows under which KEK kube-apiserver encrypts; start it, and restart kube-apiserver")
}
