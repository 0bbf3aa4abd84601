package reseal

import (
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

// AddBootStates keeps signed boot states, and seals the KEK to their key if no slot
// exists for it yet. A later generation of a key revokes the earlier one.
func AddBootStates(ctx context.Context, n *node.Node, req admin.AddBootStatesRequest) (admin.KeyringState, error) {
	changes, err := addSigned(ctx, n, req)
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("add: %w", err)
	}
	return n.Unchanged(changes...)
}

func addSigned(ctx context.Context, n *node.Node, req admin.AddBootStatesRequest) ([]string, error) {
	pub, err := bootstate.ParsePublicKey(req.PublicKey)
	if err != nil {
		return nil, err
	}
	file, err := bootstate.Parse(req.States)
	if err != nil {
		return nil, err
	}
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return nil, err
	}
	ref, g, err := oneGeneration(k.ClusterID(), file.States(), pub)
	if err != nil {
		return nil, err
	}
	key, err := authpolicy.PublicKey(pub)
	if err != nil {
		return nil, err
	}
	signer := tpm.Signer{Key: key, Ref: ref}
	if newest := newestGeneration(n, k, signer); g != 0 && g < newest {
		return nil, fmt.Errorf("generation %d of that key was revoked by generation %d; sign the boot states with --generation %d", g, newest, newest)
	}
	// An extra boot state opens nothing, but a missing one locks the node out. So
	// none is removed before the slot for the new ones exists.
	if err := keepStates(ctx, n, file.States(), func(bootstate.State) bool { return true }); err != nil {
		return nil, err
	}
	changes, err := enrol(ctx, n, signer, g)
	if err != nil {
		return nil, err
	}
	err = keepStates(ctx, n, nil, func(s bootstate.State) bool {
		old, known := slotview.Generation(k.ClusterID(), s.Ref)
		return s.KeyFingerprint != file.States()[0].KeyFingerprint || known && (old == g || old == 0 || g == 0)
	})
	if err != nil {
		n.Log.Warn("signed boot states", "file", n.Config.BootStates(), "error", err) // no slot opens with them any more
	}
	if n.Config.TPM.BootPolicy != "" {
		changes = append(changes, "the boot policy "+n.Config.TPM.BootPolicy+" judges these boots too, and must allow them: see docs/updates.md")
	}
	return append([]string{fmt.Sprintf("%s of key %.16s added", seal.Count(len(file.States()), "boot state"), slotview.Fingerprint(signer))}, changes...), nil
}

// newestGeneration returns the latest generation of a signer's key for which a slot
// exists or existed: added boot states are kept after their slot is gone.
func newestGeneration(n *node.Node, k *keyring.Keyring, signer tpm.Signer) (newest uint64) {
	for _, s := range n.View.BootStates(k.Slots(), tpm.UseSigned) {
		if g, _ := slotview.Generation(k.ClusterID(), s.Signer.Ref); slotview.Fingerprint(*s.Signer) == slotview.Fingerprint(signer) {
			newest = max(newest, g)
		}
	}
	kept, err := files.ReadAnyBootStates(n.Config.BootStates())
	if err != nil {
		return newest
	}
	for _, s := range kept.States() {
		if g, _ := slotview.Generation(k.ClusterID(), s.Ref); hex.EncodeToString(s.KeyFingerprint[:]) == slotview.Fingerprint(signer) {
			newest = max(newest, g)
		}
	}
	return newest
}

// oneGeneration checks that all states are signed by the key, for this cluster or
// in systemd's form, and for one generation.
func oneGeneration(cluster seal.ClusterID, states []bootstate.State, pub crypto.PublicKey) (ref []byte, g uint64, err error) {
	if len(states) == 0 {
		return nil, 0, errors.New("the file holds no signed boot state; sign one with kleidi bootstate sign --key FILE --cluster-id ID --event-log FILE")
	}
	for _, s := range states {
		if err := s.Verify(pub); err != nil {
			return nil, 0, err
		}
		if string(s.Ref) != string(states[0].Ref) {
			return nil, 0, errors.New("the file holds boot states of several generations; give one file for each")
		}
	}
	g, known := slotview.Generation(cluster, states[0].Ref)
	if !known {
		return nil, 0, fmt.Errorf("the boot states are signed for a cluster other than %s; sign them with --cluster-id %s", cluster, cluster)
	}
	return states[0].Ref, g, nil
}

// keepStates stores signed boot states, together with the present ones for which stays
// is true.
func keepStates(ctx context.Context, n *node.Node, states []bootstate.State, stays func(bootstate.State) bool) error {
	file := n.State.File(n.Config.BootStates())
	kept := &bootstate.File{}
	b, version, err := file.Load(ctx)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		if kept, err = bootstate.Parse(b); err != nil {
			return fmt.Errorf("%s: %w; move it away", n.Config.BootStates(), err)
		}
	}
	merged, err := kept.Keep(stays).Merge(states...)
	if err != nil {
		return err
	}
	if b, err = merged.Marshal(); err != nil {
		return err
	}
	_, err = file.Save(ctx, b, version)
	return err
}

// enrol seals the KEK to everything that the signer signs. PCR 7 must stay the same,
// and with shim PCR 14 too.
func enrol(ctx context.Context, n *node.Node, signer tpm.Signer, g uint64) ([]string, error) {
	var changes []string
	var before []seal.Slot
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		stay, older, there, err := enrolled(ctx, n, k, signer, g)
		if err != nil {
			return nil, err
		}
		if there {
			return nil, errNothing
		}
		state, err := n.Gate.Signable(ctx)
		if err != nil {
			return nil, err
		}
		if err := anchorHolds(n, state); err != nil {
			return nil, err
		}
		state.Signer = &signer
		if !older {
			if err := n.View.CheckSeal(k.Slots()); err != nil {
				return nil, err
			}
			next, slot, err := addBootState(ctx, n, k, state, nil)
			changes = append(changes, "the KEK is sealed to "+n.View.OpensIn(slot))
			return []*keyring.Keyring{next}, err
		}
		next, _, err := ReplaceBootStates(ctx, n, k, append(stay, state))
		changes, before = append(changes, "the KEK is sealed to boot states of generation "+fmt.Sprint(g)), k.Slots()
		return []*keyring.Keyring{next}, err
	})
	if errors.Is(err, errNothing) {
		err = nil
	}
	if err == nil && before != nil {
		changes = append(changes, ReportRevoked(ctx, n, before, "boot states of the earlier generation no longer open, kept copies included")...)
	}
	return changes, err
}

// enrolled returns the boot states that stay beside a signer, whether one of them must
// be removed because it belongs to the same key and an earlier generation, and whether
// the signer has a slot.
func enrolled(ctx context.Context, n *node.Node, k *keyring.Keyring, signer tpm.Signer, g uint64) (stay []tpm.BootState, older, there bool, err error) {
	live, err := n.LiveStates(ctx, k.Slots(), tpm.UsePresent, tpm.UseNext, tpm.UseSuspend, tpm.UseSigned)
	for _, s := range live {
		if s.Signer == nil || slotview.Fingerprint(*s.Signer) != slotview.Fingerprint(signer) {
			stay = append(stay, s)
			continue
		}
		old, _ := slotview.Generation(k.ClusterID(), s.Signer.Ref)
		switch {
		case old == g:
			there = true
			stay = append(stay, s)
		case old == 0 || g == 0: // systemd's form has no generations
			stay = append(stay, s)
		default:
			older = true
		}
	}
	return stay, older, there, err
}

// RevokeBootStates removes the slots of a key. The next epoch also revokes kept copies
// of them.
func RevokeBootStates(ctx context.Context, n *node.Node, req admin.RevokeBootStatesRequest) (admin.KeyringState, error) {
	prefix := strings.ToLower(req.Key)
	gone := map[string]bool{}
	var before []seal.Slot
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		live, err := n.LiveStates(ctx, k.Slots(), tpm.UsePresent, tpm.UseNext, tpm.UseSuspend, tpm.UseSigned)
		if err != nil {
			return nil, err
		}
		var stay []tpm.BootState
		for _, s := range live {
			if s.Signer != nil && prefix != "" && strings.HasPrefix(slotview.Fingerprint(*s.Signer), prefix) {
				gone[slotview.Fingerprint(*s.Signer)] = true
				continue
			}
			stay = append(stay, s)
		}
		switch {
		case len(gone) == 0:
			return nil, fmt.Errorf("no slot is for a key whose fingerprint begins with %q; see kleidi bootstate list", req.Key)
		case len(gone) > 1:
			return nil, fmt.Errorf("%d keys have a fingerprint that begins with %q; give more of it", len(gone), req.Key)
		}
		if !slices.ContainsFunc(stay, func(s tpm.BootState) bool { return s.Use == tpm.UsePresent || s.Use == tpm.UseSigned }) {
			if err := n.RequireOpener(ctx, k, slices.DeleteFunc(k.Slots(), n.View.OfThisTPM)); err != nil {
				return nil, err
			}
		}
		before = k.Slots()
		next, _, err := ReplaceBootStates(ctx, n, k, stay)
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("revoke: %w", err)
	}
	changes := ReportRevoked(ctx, n, before, "what that key signed no longer opens, kept copies included")
	err = keepStates(ctx, n, nil, func(s bootstate.State) bool { return !gone[hex.EncodeToString(s.KeyFingerprint[:])] })
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("revoke: the slots are revoked, but the boot states are still in the file: %w", err)
	}
	return n.Unchanged(changes...)
}
