//go:build cgo

package hsm

import (
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/seal"
)

// trim removes the padding of PKCS#11's fixed fields, and replaces bytes that are not
// UTF-8.
func trim(s string) string { return strings.ToValidUTF8(strings.TrimRight(s, " \x00"), "?") }

func nameOf(t pkcs11.TokenInfo) tokenName { return tokenName{trim(t.Label), trim(t.SerialNumber)} }

func (n tokenName) String() string { return fmt.Sprintf("%q (serial %q)", n.Label, n.Serial) }

// matches reports whether the token in this slot of the module is the configured one.
func (t *tokenMatch) matches(slot uint, info pkcs11.TokenInfo) bool {
	equal := func(want, have string) bool { return want == "" || trim(want) == trim(have) }
	return equal(t.label, info.Label) && equal(t.serial, info.SerialNumber) && equal(t.manufacturer, info.ManufacturerID) && equal(t.model, info.Model) &&
		(t.slotID == nil || *t.slotID == slot)
}

// shownTokens is the maximum number of tokens that an error lists.
const shownTokens = 6

// findToken returns the one token that matches, and the slot of the module that it is in.
func findToken(p cryptoki, want *tokenMatch) (slot uint, token pkcs11.TokenInfo, err error) {
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
