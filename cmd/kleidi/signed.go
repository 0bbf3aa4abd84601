package main

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
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

// Signed boot states: what an operator's key signed opens one slot.

// signed returns the boot states that this signer signed, from all files. What is
// wrong with a file is said, and hides no other's.
func (n *node) signed(signer tpm.Signer) []authpolicy.SignedState {
	var all []authpolicy.SignedState
	for _, path := range append([]string{n.cfg.BootStates()}, n.cfg.TPM.BootStates...) {
		f, err := readBootStates(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			n.log.Warn("signed boot states", "file", path, "error", err)
			continue
		}
		states, refused := f.Signed(signer.Key, signer.Ref)
		for _, err := range refused {
			n.log.Warn("signed boot states", "file", path, "error", err)
		}
		all = append(all, states...)
	}
	return all
}

func readBootStates(path string) (*bootstate.File, error) {
	b, err := readFile(path, bootstate.MaxSize)
	if err != nil {
		return nil, err
	}
	return bootstate.Parse(b)
}

// maxGeneration bounds the generations of signed boot states, which are told from
// their reference by trying.
const maxGeneration = 1 << 16

// generation finds what a reference is for: 0 is systemd's, which has none.
func generation(cluster seal.ClusterID, ref []byte) (uint64, bool) {
	if len(ref) == 0 {
		return 0, true
	}
	for g := uint64(1); g <= maxGeneration; g++ {
		if string(bootstate.Ref(cluster, g)) == string(ref) {
			return g, true
		}
	}
	return 0, false
}

// signer returns the fingerprint of the key, and the generation, of a slot for
// signed boot states.
func (n *node) signer(s seal.Slot, cluster string) (fingerprint string, g uint64) {
	d, err := tpm.DemandOf(ofTPM(s), n.gate.Counter)
	if ofTPM(s).Type != seal.TypeTPM || err != nil || d.State.Signer == nil {
		return "", 0
	}
	if id, err := seal.ParseClusterID(cluster); err == nil {
		g, _ = generation(id, d.State.Signer.Ref)
	}
	return fingerprintOf(*d.State.Signer), g
}

func fingerprintOf(s tpm.Signer) string {
	pub, err := s.Public()
	if err != nil {
		return "unreadable"
	}
	f, err := bootstate.KeyFingerprint(pub)
	if err != nil {
		return "unreadable"
	}
	return hex.EncodeToString(f[:])
}

// addBootStates keeps signed boot states, and seals the KEK to their key where no
// slot is for it yet. A later generation of a key revokes the earlier one.
func (n *node) addBootStates(ctx context.Context, req admin.AddBootStatesRequest) (admin.KeyringState, error) {
	changes, err := n.addSigned(ctx, req)
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("add: %w", err)
	}
	return n.unchanged(changes...)
}

func (n *node) addSigned(ctx context.Context, req admin.AddBootStatesRequest) ([]string, error) {
	pub, err := bootstate.ParsePublicKey(req.PublicKey)
	if err != nil {
		return nil, err
	}
	file, err := bootstate.Parse(req.States)
	if err != nil {
		return nil, err
	}
	k, err := n.unlocker.Keyring()
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
	if newest := n.newest(k, signer); g != 0 && g < newest {
		return nil, fmt.Errorf("generation %d of that key was revoked by generation %d; sign the boot states with --generation %d", g, newest, newest)
	}
	// A state too many opens nothing, one too few locks the node out: none goes
	// before the slot for the new ones is there.
	if err := n.keepStates(ctx, file.States(), func(bootstate.State) bool { return true }); err != nil {
		return nil, err
	}
	changes, err := n.enrol(ctx, signer, g)
	if err != nil {
		return nil, err
	}
	err = n.keepStates(ctx, nil, func(s bootstate.State) bool {
		old, known := generation(k.ClusterID(), s.Ref)
		return s.KeyFingerprint != file.States()[0].KeyFingerprint || known && (old == g || old == 0 || g == 0)
	})
	if err != nil {
		n.log.Warn("signed boot states", "file", n.cfg.BootStates(), "error", err) // none of them opens any more
	}
	if n.cfg.TPM.BootPolicy != "" {
		changes = append(changes, "the boot policy "+n.cfg.TPM.BootPolicy+" judges these boots too, and has to allow them: see docs/updates.md")
	}
	return append([]string{fmt.Sprintf("%d boot states of key %.16s added", len(file.States()), fingerprintOf(signer))}, changes...), nil
}

// newest is the latest generation of a signer's key that a slot is for, or was: the
// boot states that were added are kept where a slot has gone.
func (n *node) newest(k *keyring.Keyring, signer tpm.Signer) (newest uint64) {
	for _, s := range n.states(k.Slots(), tpm.UseSigned) {
		if g, _ := generation(k.ClusterID(), s.Signer.Ref); fingerprintOf(*s.Signer) == fingerprintOf(signer) {
			newest = max(newest, g)
		}
	}
	kept, err := readBootStates(n.cfg.BootStates())
	if err != nil {
		return newest
	}
	for _, s := range kept.States() {
		if g, _ := generation(k.ClusterID(), s.Ref); hex.EncodeToString(s.KeyFingerprint[:]) == fingerprintOf(signer) {
			newest = max(newest, g)
		}
	}
	return newest
}

// oneGeneration checks that all states are signed by the key, for this cluster or
// in systemd's form, and for one generation.
func oneGeneration(cluster seal.ClusterID, states []bootstate.State, pub crypto.PublicKey) (ref []byte, g uint64, err error) {
	if len(states) == 0 {
		return nil, 0, errors.New("the file holds no signed boot state; sign one with kleidi bootstate sign")
	}
	for _, s := range states {
		if err := s.Verify(pub); err != nil {
			return nil, 0, err
		}
		if string(s.Ref) != string(states[0].Ref) {
			return nil, 0, errors.New("the file holds boot states of several generations; give one file for each")
		}
	}
	g, known := generation(cluster, states[0].Ref)
	if !known {
		return nil, 0, fmt.Errorf("the boot states are signed for another cluster than %s; sign them with --cluster-id %s", cluster, cluster)
	}
	return states[0].Ref, g, nil
}

// keepStates stores signed boot states with those there that stay.
func (n *node) keepStates(ctx context.Context, states []bootstate.State, stays func(bootstate.State) bool) error {
	file := n.state.file(n.cfg.BootStates())
	kept := &bootstate.File{}
	b, version, err := file.Load(ctx)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		if kept, err = bootstate.Parse(b); err != nil {
			return fmt.Errorf("%s: %w; move it away", n.cfg.BootStates(), err)
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

// enrol seals the KEK to whatever the signer signs. PCR 7 stays as it is, with
// shim PCR 14 too.
func (n *node) enrol(ctx context.Context, signer tpm.Signer, g uint64) ([]string, error) {
	var changes []string
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		stay, older, there, err := n.enrolled(ctx, k, signer, g)
		if err != nil {
			return nil, err
		}
		if there {
			return nil, errNothing
		}
		state, err := n.gate.Signable(ctx)
		if err != nil {
			return nil, err
		}
		if err := n.anchorHolds(state); err != nil {
			return nil, err
		}
		state.Signer = &signer
		if !older {
			next, slot, err := n.extend(ctx, k, state, nil, false)
			changes = append(changes, "the KEK is sealed to "+n.what(slot))
			return []*keyring.Keyring{next}, err
		}
		next, _, err := n.reshape(ctx, k, append(stay, state))
		changes = append(changes, "the KEK is sealed to boot states of generation "+fmt.Sprint(g), "boot states of the earlier generation no longer open, kept copies included")
		return []*keyring.Keyring{next}, err
	})
	if errors.Is(err, errNothing) {
		err = nil
	}
	return changes, err
}

// enrolled returns the boot states that stay beside a signer, whether one of them
// has to go because it is of the same key and an earlier generation, and whether
// the signer has a slot.
func (n *node) enrolled(ctx context.Context, k *keyring.Keyring, signer tpm.Signer, g uint64) (stay []tpm.BootState, older, there bool, err error) {
	live, err := n.live(ctx, k.Slots(), tpm.UsePresent, tpm.UseNext, tpm.UseSuspend, tpm.UseSigned)
	for _, s := range live {
		if s.Signer == nil || fingerprintOf(*s.Signer) != fingerprintOf(signer) {
			stay = append(stay, s)
			continue
		}
		old, _ := generation(k.ClusterID(), s.Signer.Ref)
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

// revokeBootStates takes the slots of a key away, and with the next epoch what
// anyone kept of them.
func (n *node) revokeBootStates(ctx context.Context, req admin.RevokeBootStatesRequest) (admin.KeyringState, error) {
	prefix := strings.ToLower(req.Key)
	gone := map[string]bool{}
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		live, err := n.live(ctx, k.Slots(), tpm.UsePresent, tpm.UseNext, tpm.UseSuspend, tpm.UseSigned)
		if err != nil {
			return nil, err
		}
		var stay []tpm.BootState
		for _, s := range live {
			if s.Signer != nil && prefix != "" && strings.HasPrefix(fingerprintOf(*s.Signer), prefix) {
				gone[fingerprintOf(*s.Signer)] = true
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
			if err := n.someOpens(ctx, k, slices.DeleteFunc(k.Slots(), n.isTPM)); err != nil {
				return nil, err
			}
		}
		next, _, err := n.reshape(ctx, k, stay)
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("revoke: %w", err)
	}
	err = n.keepStates(ctx, nil, func(s bootstate.State) bool { return !gone[hex.EncodeToString(s.KeyFingerprint[:])] })
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("revoke: the slots are revoked, and the boot states are still in the file: %w", err)
	}
	return n.unchanged("what that key signed no longer opens, kept copies included")
}
