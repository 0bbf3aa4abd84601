package slotview

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// bindingMembers are the members of a slot's data that hold its binding, by type. They
// survive a rotation, which wraps another KEK for the same TPM, key or recipients. The
// ID of any other slot is a digest of all its data.
var bindingMembers = map[string][]string{
	seal.TypeTPM:       {"bank", "pcrs", "signer", "resets"},
	seal.TypeRecovery:  {"recipients"},
	seal.TypePKCS11:    {"token", "key"},
	seal.TypeVault:     {"namespace", "mount", "key"},
	seal.TypeKMSPlugin: {"keyID"},
}

// idSize is the length of an ID in hexadecimal digits, and shortID the minimum number
// of them in a name.
const idSize, shortID = 16, 4

// IDs returns the ID of each slot: a digest of its binding. Slots with the same binding
// have IDs of their whole data instead, so that each ID is unique.
func IDs(slots []seal.Slot) []string {
	ids := make([]string, len(slots))
	count := map[string]int{}
	for i, s := range slots {
		ids[i] = bindingID(s)
		count[TypeOf(s)+ids[i]]++
	}
	for i, s := range slots {
		if count[TypeOf(s)+ids[i]] > 1 {
			ids[i] = dataID(s)
		}
	}
	return ids
}

// bindingID is the ID of a slot that is the only one with its binding.
func bindingID(s seal.Slot) string {
	if binding, ok := bindingOf(s); ok {
		return digest(binding...)
	}
	return dataID(s)
}

// bindingOf returns the binding of a slot, or false if its data can't be read.
func bindingOf(s seal.Slot) (binding []string, ok bool) {
	binding = []string{s.Type, s.Node}
	for _, part := range []seal.Slot{TPMPart(s), secondPart(s)} {
		var data map[string]json.RawMessage
		members := bindingMembers[part.Type]
		if part.Type == "" {
			continue
		}
		if members == nil || json.Unmarshal(part.Data, &data) != nil {
			return nil, false
		}
		for _, m := range members {
			var value bytes.Buffer
			if data[m] != nil && json.Compact(&value, data[m]) != nil {
				return nil, false
			}
			binding = append(binding, value.String())
		}
	}
	return binding, true
}

func dataID(s seal.Slot) string { return digest(s.Type, s.Node, string(s.Data)) }

func digest(parts ...string) string {
	b, _ := json.Marshal(parts) // strings always encode
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])[:idSize]
}

// Names names slots by their type. If there are several of a type, the first digits of
// the ID follow. So a name never comes to mean another slot after a removal.
func Names(slots []seal.Slot) []string {
	count := map[string]int{}
	for _, s := range slots {
		count[TypeOf(s)]++
	}
	ids := IDs(slots)
	names := make([]string, len(slots))
	for i, s := range slots {
		t := TypeOf(s)
		names[i] = t
		if count[t] > 1 {
			names[i] += "-" + ids[i][:uniqueLength(slots, ids, i)]
		}
	}
	return names
}

// uniqueLength returns how many digits distinguish the ID of slot i from the others of
// its type.
func uniqueLength(slots []seal.Slot, ids []string, i int) int {
	n := shortID
	for j, other := range ids {
		if j == i || TypeOf(slots[j]) != TypeOf(slots[i]) || other == ids[i] {
			continue
		}
		for strings.HasPrefix(other, ids[i][:n]) {
			n++
		}
	}
	return n
}

// Find returns the index of the slot with that name: as in [Names], with more digits of
// its ID, or an age recipient.
func Find(slots []seal.Slot, name string) (int, error) {
	var found []int
	for i, s := range slots {
		if named(s, name) {
			found = append(found, i)
		}
	}
	all := Names(slots)
	switch {
	case len(found) == 0:
		return 0, fmt.Errorf("there is no slot %q, but %s; see kleidi slot list", name, JoinWords(all))
	case slices.ContainsFunc(found, func(i int) bool { return Identity(slots[i]) != Identity(slots[found[0]]) }):
		var which []string
		for _, i := range found {
			which = append(which, all[i])
		}
		return 0, fmt.Errorf("%q may be any of %s; name one of them, see kleidi slot list", name, JoinWords(which))
	}
	return found[0], nil
}

// Places returns the indexes of several named slots.
func Places(slots []seal.Slot, names []string) (at []int, err error) {
	for _, name := range names {
		i, err := Find(slots, name)
		if err != nil {
			return nil, err
		}
		at = append(at, i)
	}
	return at, nil
}

// IsLastRecovery reports whether the slots at these indexes are the only ones for a
// recovery identity.
func IsLastRecovery(slots []seal.Slot, at ...int) bool {
	gone, stays := false, false
	for i, s := range slots {
		if s.Type == seal.TypeRecovery {
			gone, stays = gone || slices.Contains(at, i), stays || !slices.Contains(at, i)
		}
	}
	return gone && !stays
}

// ErrLastRecovery is the refusal to remove the last recovery slot.
var ErrLastRecovery = errors.New("it is the last recovery slot: if this TPM fails, is cleared, or the machine boots differently, every Secret is lost; if that is what you want, add --accept-data-loss, else run kleidi slot add recovery --recipient age1… first")

// named reports whether a name may mean a slot.
func named(s seal.Slot, name string) bool {
	if strings.HasPrefix(name, "age1") {
		recipients, err := recovery.Recipients(s)
		return err == nil && slices.Contains(recipients, name)
	}
	id, ok := strings.CutPrefix(name, TypeOf(s))
	if !ok || id == "" {
		return ok
	}
	id, ok = strings.CutPrefix(id, "-")
	return ok && len(id) >= shortID && (strings.HasPrefix(bindingID(s), id) || strings.HasPrefix(dataID(s), id))
}

// Identity distinguishes slots by type, node and data.
func Identity(s seal.Slot) string { return s.Type + "\x00" + s.Node + "\x00" + string(s.Data) }

// NameOf is the name of a slot of a keyring.
func NameOf(k *keyring.Keyring, s seal.Slot) string {
	slots := k.Slots()
	for i, name := range Names(slots) {
		if Identity(slots[i]) == Identity(s) {
			return name
		}
	}
	return s.Type
}

func JoinWords(words []string) string { return strings.Join(words, ", ") }
