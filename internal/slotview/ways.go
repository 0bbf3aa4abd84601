package slotview

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/tpm"
)

// Way is one way into a keyring: a boot state of a TPM, a key of a token or a server, or
// one recovery recipient.
type Way struct {
	// ID is a digest of the TPM, key or recipient. A rotation does not change it.
	ID string `json:"id"`
	// Slot describes the way in words.
	Slot string `json:"slot"`
}

// Ways returns the ways into a keyring with these slots.
func (r Reader) Ways(slots []seal.Slot) (ways []Way) {
	add := func(w Way) {
		if !hasWay(ways, w) {
			ways = append(ways, w)
		}
	}
	for _, s := range slots {
		recipients, err := recovery.Recipients(s)
		switch {
		case s.Type == seal.TypeSkipped, s.Type == seal.TypeUnrevoked: // they open nothing
		case s.Type == seal.TypeRecovery && err == nil:
			for _, name := range recipients {
				add(Way{wayID(s.Type, name), s.Type + ": " + name})
			}
		default:
			add(r.way(s))
		}
	}
	return ways
}

func (r Reader) way(s seal.Slot) Way {
	binding, ok := bindingOf(s)
	if !ok {
		binding = []string{s.Type, s.Node, string(s.Data)}
	}
	text := s.Type + ": " + r.Binding(s)
	if s.Node != "" && s.Node != r.Node {
		text = s.Type + " of node " + s.Node + ": " + r.Binding(s)
	}
	if half := TPMPart(s); half.Type == seal.TypeTPM {
		if c, err := tpm.CopiesOf(half); err == nil {
			binding = append(binding, c.EK, hex.EncodeToString(c.SRK))
		}
	}
	return Way{wayID(binding...), text}
}

func wayID(parts ...string) string {
	b, _ := json.Marshal(parts) // strings always encode
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// HintOutside says what to do with a keyring that was changed from outside.
const HintOutside = "remove a slot that you don't know with kleidi slot remove NAME; if all slots are as you want them, run kleidi rotate --yes"

func hasWay(ways []Way, w Way) bool {
	return slices.ContainsFunc(ways, func(other Way) bool { return other.ID == w.ID })
}

// WithoutWays returns the ways that are in a but not in b.
func WithoutWays(a, b []Way) []Way {
	return slices.DeleteFunc(slices.Clone(a), func(w Way) bool { return hasWay(b, w) })
}

// WithWays returns the ways of a and b.
func WithWays(a, b []Way) []Way { return append(slices.Clone(a), WithoutWays(b, a)...) }

// DescribeWays describes each way in words.
func DescribeWays(ways []Way) (all []string) {
	for _, w := range ways {
		all = append(all, w.Slot)
	}
	return all
}
