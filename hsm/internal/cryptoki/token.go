//go:build cgo

package cryptoki

import (
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

func nameOf(t pkcs11.TokenInfo) keyslot.TokenName {
	return keyslot.TokenName{Label: keyslot.Trim(t.Label), Serial: keyslot.Trim(t.SerialNumber)}
}

// matches reports whether the token in this slot of the module is the configured one.
func (t *TokenMatch) matches(slot uint, info pkcs11.TokenInfo) bool {
	equal := func(want, have string) bool { return want == "" || keyslot.Trim(want) == keyslot.Trim(have) }
	return equal(t.Label, info.Label) && equal(t.Serial, info.SerialNumber) && equal(t.Manufacturer, info.ManufacturerID) && equal(t.Model, info.Model) &&
		(t.SlotID == nil || *t.SlotID == slot)
}

// ReadToken returns what the one token that matches reports about itself. Call it in a [Call]
// on m.
func ReadToken(m *Module, want *TokenMatch) (pkcs11.TokenInfo, error) {
	_, info, err := findToken(m.Functions, want)
	return info, err
}

// shownTokens is the maximum number of tokens that an error lists.
const shownTokens = 6

// findToken returns the one token that matches, and the slot of the module that it is in.
func findToken(p Functions, want *TokenMatch) (slot uint, token pkcs11.TokenInfo, err error) {
	slots, err := p.GetSlotList(true)
	if err != nil {
		return 0, token, fmt.Errorf("C_GetSlotList: %w", err)
	}
	var present []string
	found := 0
	for _, candidate := range slots {
		info, err := p.GetTokenInfo(candidate)
		if err != nil {
			continue // the token was taken out in the meantime
		}
		if present = append(present, nameOf(info).String()); len(present) > shownTokens {
			present = append(present[:shownTokens], "…")
		}
		if want.matches(candidate, info) {
			slot, token = candidate, info
			found++
		}
	}
	if found == 1 {
		return slot, token, nil
	}
	list := strings.Join(present, ", ")
	if list == "" {
		list = "none"
	}
	if found > 1 {
		return 0, token, seal.Errorf(seal.CauseUnavailable, "add serial=… to pkcs11.uri", "%d tokens match the configuration; the module shows: %s", found, list)
	}
	return 0, token, seal.Errorf(seal.CauseUnavailable, "connect the token, or name one of those with token=… in pkcs11.uri; kleidi tries again by itself",
		"the token is not there; the module shows: %s", list)
}
