package slotview

import (
	"bytes"
	"encoding/hex"
	"maps"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

// Demands returns the demands of this node's TPM slots, by their indexes in slots.
func (r Reader) Demands(slots []seal.Slot) map[int]tpm.Demand {
	all := map[int]tpm.Demand{}
	for i, s := range slots {
		if !r.OfThisTPM(s) {
			continue
		}
		if d, err := tpm.DemandOf(TPMPart(s), r.Counter); err == nil {
			all[i] = d
		}
	}
	return all
}

// BootStates returns the boot states of this node's slots for these uses.
func (r Reader) BootStates(slots []seal.Slot, uses ...tpm.Use) []tpm.BootState {
	var states []tpm.BootState
	demands := r.Demands(slots)
	for _, i := range slices.Sorted(maps.Keys(demands)) {
		if s := demands[i].State; slices.Contains(uses, s.Use) {
			states = append(states, s)
		}
	}
	return states
}

// Revoked reports whether the epoch of a slot of this TPM has passed.
func (r Reader) Revoked(s seal.Slot, epoch uint64) bool {
	d, ok := r.Demands([]seal.Slot{s})[0]
	return ok && d.AtMost < epoch
}

// SameState reports whether two boot states have the same PCR values.
func SameState(a, b tpm.BootState) bool {
	return a.Bank == b.Bank && maps.EqualFunc(a.Values, b.Values, bytes.Equal)
}

// OldestNext returns the oldest slot for a next boot if there are MaxNext of them.
// Among slots made in the same second, later ones come later in the list.
func (r Reader) OldestNext(slots []seal.Slot) *seal.Slot {
	var next []int
	demands := r.Demands(slots)
	for _, i := range slices.Sorted(maps.Keys(demands)) {
		if demands[i].State.Use == tpm.UseNext {
			next = append(next, i)
		}
	}
	if len(next) < MaxNext {
		return nil
	}
	slices.SortStableFunc(next, func(a, b int) int { return demands[a].Made.Compare(demands[b].Made) })
	return &slots[next[0]]
}

// MaxNext bounds the slots for next boots: an update may build its files several times.
// The oldest is dropped, and the epoch revokes it.
const MaxNext = 4

// MadeAt says when a slot of this TPM was made.
func (r Reader) MadeAt(s seal.Slot) string {
	return r.Demands([]seal.Slot{s})[0].Made.Local().Format(time.DateTime)
}

// Fingerprint returns the fingerprint of a signer's key, in hexadecimal, or "unreadable".
func Fingerprint(s tpm.Signer) string {
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

// Signer returns the key's fingerprint and the generation of a slot for signed boot
// states.
func (r Reader) Signer(s seal.Slot, cluster string) (fingerprint string, g uint64) {
	d, err := tpm.DemandOf(TPMPart(s), r.Counter)
	if TPMPart(s).Type != seal.TypeTPM || err != nil || d.State.Signer == nil {
		return "", 0
	}
	if id, err := seal.ParseClusterID(cluster); err == nil {
		g, _ = Generation(id, d.State.Signer.Ref)
	}
	return Fingerprint(*d.State.Signer), g
}

// Generation finds the generation of a policyRef; 0 is systemd's form, which has none.
func Generation(cluster seal.ClusterID, ref []byte) (uint64, bool) {
	if len(ref) == 0 {
		return 0, true
	}
	for g := uint64(1); g <= MaxGeneration; g++ {
		if string(bootstate.Ref(cluster, g)) == string(ref) {
			return g, true
		}
	}
	return 0, false
}

// MaxGeneration bounds the generations of signed boot states, because the generation is
// found from the policyRef by trying.
const MaxGeneration = 1 << 16

// Suspends reports whether a slot is this node's slot for a suspension.
func (r Reader) Suspends(s seal.Slot) bool {
	return len(r.BootStates([]seal.Slot{s}, tpm.UseSuspend)) > 0
}
