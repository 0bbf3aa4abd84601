package slotview

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// WithTPM returns the two-of-two of the TPM and this wrapper; "" if there is none.
func WithTPM(second string) string {
	for _, kind := range []string{seal.TypeTPMAndPKCS11, seal.TypeTPMAndVault, seal.TypeTPMAndKMSPlugin} {
		if Second(kind) == second {
			return kind
		}
	}
	return ""
}

// TwoOfTwo returns the two-of-two that must open on this node; "" if one wrapper is
// enough.
func (r Reader) TwoOfTwo() string {
	for _, kind := range r.Order {
		if Second(kind) != "" {
			return kind
		}
	}
	return ""
}

// BackendPart returns the slot of a token, a server or a plugin in a slot: the slot itself,
// or its half of a two-of-two; an empty slot if there is none.
func BackendPart(s seal.Slot) seal.Slot {
	if IsSecondary(s.Type) {
		return s
	}
	return secondPart(s)
}

// TPMParts returns slots with the TPM's half in place of each two-of-two. The gate, the
// epoch and everything else that reads the TPM's demands use it.
func TPMParts(slots []seal.Slot) []seal.Slot {
	out := slices.Clone(slots)
	for i, s := range out {
		out[i] = TPMPart(s)
	}
	return out
}

// HasTwoOfTwo reports whether one of the slots is a two-of-two, or a placeholder for
// one.
func HasTwoOfTwo(slots []seal.Slot) bool {
	return slices.ContainsFunc(slots, func(s seal.Slot) bool { return Second(TypeOf(s)) != "" })
}

// OfThisTPM reports whether a slot belongs to this node's TPM, alone or with another
// wrapper.
func (r Reader) OfThisTPM(s seal.Slot) bool {
	return (s.Type == seal.TypeTPM || Second(s.Type) != "") && s.Node == r.Node
}

// singles returns the names of the slots that one wrapper opens alone, without the
// skipped ones.
func singles(slots []seal.Slot, skipped []int) (names []string) {
	for i, name := range Names(slots) {
		if s := slots[i]; !slices.Contains(skipped, i) && s.Type != seal.TypeSkipped && Second(s.Type) == "" {
			names = append(names, name)
		}
	}
	return names
}

// ReportSingles lists the slots that one wrapper opens although two are needed, or were
// needed in the backup.
func (r Reader) ReportSingles(backup, slots []seal.Slot) (changes []string) {
	if names := singles(slots, nil); len(names) > 0 && (r.TwoOfTwo() != "" || HasTwoOfTwo(backup)) {
		changes = []string{"TWO OF TWO IS BROKEN: each of these slots opens the KEK alone: " + JoinWords(names)}
	}
	return changes
}

// CheckRestore refuses to bring back, beside a two-of-two, a slot that opens the KEK
// alone and may have been removed in the meantime.
func (r Reader) CheckRestore(k *keyring.Keyring, without []string) error {
	if r.TwoOfTwo() == "" && !HasTwoOfTwo(k.Slots()) {
		return nil
	}
	skipped, err := Places(k.Slots(), without)
	if err != nil {
		return fmt.Errorf("--skip-slot: %w", err)
	}
	names := singles(k.Slots(), skipped)
	if len(names) == 0 {
		return nil
	}
	hint := "if that is what you want, add --break-two-of-two"
	if !Full(k) { // otherwise no fresh KEK without them is made
		hint += ", else --skip-slot " + strings.Join(names, " --skip-slot ")
	}
	return fmt.Errorf("slots that may have been removed would come back, open the KEK alone, and break two of two: %s; %s", JoinWords(names), hint)
}

// Full reports whether a keyring has no room to retire its current KEK.
func Full(k *keyring.Keyring) bool { return !k.HasRoom() }

// CheckAdd refuses a slot that one wrapper opens alone, beside a two-of-two.
func (r Reader) CheckAdd(kind string, slots []seal.Slot) error {
	has := r.TwoOfTwo() != "" || HasTwoOfTwo(slots)
	if !has || Second(kind) != "" {
		return nil
	}
	return errors.New("a slot of " + kind + " would open the KEK alone, and break two of two; if that is what you want, add --break-two-of-two")
}

// CheckRecovery refuses a recovery that leaves a new single way to open the keyring
// beside a two-of-two, or makes one wrapper enough although two were needed.
func (r Reader) CheckRecovery(old []seal.Slot) error {
	had := HasTwoOfTwo(old)
	switch wants := r.TwoOfTwo() != ""; {
	case had == wants:
		return nil
	case wants:
		return r.CheckAdd(seal.TypeRecovery, old)
	default:
		return errors.New("the keyring needs two wrappers together, and unlock.order lets one open it; set unlock.order to that two-of-two, or add --break-two-of-two")
	}
}

// CheckSeal refuses to seal to the TPM alone beside or in place of a two-of-two:
// unlock.order may no longer name the two-of-two.
func (r Reader) CheckSeal(slots []seal.Slot) error {
	if r.TwoOfTwo() != "" || !HasTwoOfTwo(slots) {
		return nil
	}
	return errors.New("the keyring needs two wrappers together, and unlock.order names no two-of-two; set unlock.order to that two-of-two, or, if one is to be enough, run kleidi reseal --break-two-of-two")
}

// ReportBroken says that the TPM alone opens the KEK, although slots needed two
// wrappers.
func (r Reader) ReportBroken(slots []seal.Slot) (changes []string) {
	if r.TwoOfTwo() == "" && HasTwoOfTwo(slots) {
		changes = []string{"TWO OF TWO IS BROKEN: the TPM opens the KEK alone"}
	}
	return changes
}

// CheckFreshKEK refuses a two-of-two for a KEK that one wrapper may have held alone.
// That happens if there is no room to retire the KEK.
func (r Reader) CheckFreshKEK(k *keyring.Keyring) error {
	if r.TwoOfTwo() == "" || HasTwoOfTwo(k.Slots()) || !Full(k) {
		return nil
	}
	return seal.Errorf(seal.CauseStore, "set unlock.order to tpm, or to the other wrapper that opened this keyring, and run the command again; it can't become two of two (see docs/operations.md)",
		"two of two needs a fresh KEK, but the keyring holds %d retired KEKs already, and no more fit", keyring.MaxRetired)
}
