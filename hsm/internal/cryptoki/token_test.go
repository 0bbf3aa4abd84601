//go:build cgo

package cryptoki

import (
	"testing"

	"github.com/miekg/pkcs11"
)

// TestMatches: every attribute that the configuration names must match.
func TestMatches(t *testing.T) {
	two := uint(2)
	info := pkcs11.TokenInfo{Label: "kleidi  ", SerialNumber: "01\x00", ManufacturerID: "maker", Model: "model"}
	for name, row := range map[string]struct {
		token TokenMatch
		want  bool
	}{
		"nothing named":      {TokenMatch{}, true},
		"everything":         {TokenMatch{Label: "kleidi", Serial: "01", Manufacturer: "maker", Model: "model", SlotID: &two}, true},
		"other label":        {TokenMatch{Label: "kleid"}, false},
		"other serial":       {TokenMatch{Serial: "02"}, false},
		"other manufacturer": {TokenMatch{Manufacturer: "forger"}, false},
		"other model":        {TokenMatch{Model: "model 2"}, false},
		"other slot":         {TokenMatch{SlotID: new(uint)}, false},
	} {
		if got := row.token.matches(two, info); got != row.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
