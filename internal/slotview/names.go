package slotview

import (
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Names names slots by their type, with a number where there are several.
func Names(slots []seal.Slot) []string {
	count, seen := map[string]int{}, map[string]int{}
	for _, s := range slots {
		count[TypeOf(s)]++
	}
	names := make([]string, len(slots))
	for i, s := range slots {
		t := TypeOf(s)
		seen[t]++
		names[i] = t
		if count[t] > 1 {
			names[i] = fmt.Sprintf("%s/%d", t, seen[t])
		}
	}
	return names
}

// Find returns the place of a named slot.
func Find(slots []seal.Slot, name string) (int, error) {
	names := Names(slots)
	if i := slices.Index(names, name); i >= 0 {
		return i, nil
	}
	return 0, fmt.Errorf("there is no slot %q, but %s; see kleidi slot list", name, JoinWords(names))
}

// Identity tells slots apart by type, node and data.
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
