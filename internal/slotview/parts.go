package slotview

import (
	"slices"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
)

// Second returns the second wrapper of a two-of-two, by its name in unlock.order; it is
// "" for other types.
func Second(kind string) string {
	switch kind {
	case seal.TypeTPMAndPKCS11:
		return seal.TypePKCS11
	case seal.TypeTPMAndVault:
		return seal.TypeVault
	case seal.TypeTPMAndKMSPlugin:
		return seal.TypeKMSPlugin
	}
	return ""
}

// TPMPart returns the slot of the TPM in a slot: the slot itself, or its half of a
// two-of-two.
func TPMPart(s seal.Slot) seal.Slot {
	if Second(s.Type) == "" {
		return s
	}
	first, _, err := both.Parts(s)
	if err != nil {
		return seal.Slot{}
	}
	return first
}

// secondPart returns the half of a two-of-two that is not the TPM's; an empty slot for
// any other slot.
func secondPart(s seal.Slot) seal.Slot {
	if Second(s.Type) == "" {
		return seal.Slot{}
	}
	_, second, err := both.Parts(s)
	if err != nil {
		return seal.Slot{}
	}
	return second
}

// IsSecondary reports whether a token, a server or a plugin alone opens slots of a type.
func IsSecondary(kind string) bool { return slices.Contains(Secondary, kind) }

// Secondary are the types of the slots that a token, a server or a plugin opens alone.
var Secondary = []string{seal.TypePKCS11, seal.TypeVault, seal.TypeKMSPlugin}
