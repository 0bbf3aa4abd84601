package slotview

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

const (
	p11And   = seal.TypeTPMAndPKCS11
	vaultAnd = seal.TypeTPMAndVault
)

// of returns slots of these types for node cp-1, or for every node if the type says so.
// "-tpm" is the placeholder of a TPM slot that a rotation left out.
func of(t *testing.T, kinds ...string) (slots []seal.Slot) {
	t.Helper()
	for _, kind := range kinds {
		kind, skipped := strings.CutPrefix(kind, "-")
		s := seal.Slot{Type: kind, Data: json.RawMessage("{}")}
		if kind == seal.TypeTPM || Second(kind) != "" {
			s.Node = "cp-1"
		}
		if skipped {
			var err error
			if s, err = Skip(s); err != nil {
				t.Fatal(err)
			}
		}
		slots = append(slots, s)
	}
	return slots
}

func TestEveryBackendHasATwoOfTwo(t *testing.T) {
	for _, kind := range Secondary {
		if got := Second(WithTPM(kind)); got != kind {
			t.Errorf("the two-of-two with %s: second wrapper %q", kind, got)
		}
	}
	if got := WithTPM(seal.TypeRecovery); got != "" {
		t.Errorf("a two-of-two with recovery: %q", got)
	}
}

func reader(order ...string) Reader { return Reader{Node: "cp-1", Order: order} }

func TestSinglesOfABackupOfTwo(t *testing.T) {
	got := reader("tpm").ReportSingles(of(t, p11And), of(t, "tpm", "-vault", p11And, "tpm"))
	if len(got) != 1 || strings.Count(got[0], "tpm-") != 2 {
		t.Errorf("%q", got)
	}
}

func TestOfThisTPM(t *testing.T) {
	for kind, want := range map[string]bool{"tpm": true, p11And: true, vaultAnd: true, "pkcs11": false, "recovery": false, "-tpm": false} {
		s := of(t, kind)[0]
		if got := reader().OfThisTPM(s); got != want {
			t.Errorf("%s: %v", kind, got)
		}
		if s.Node = "cp-2"; reader().OfThisTPM(s) {
			t.Errorf("%s of another node is taken for this one's", kind)
		}
	}
}

// TestPartsOfADamagedTwoOfTwo: an unreadable slot is never a slot of the TPM.
func TestPartsOfADamagedTwoOfTwo(t *testing.T) {
	damaged := of(t, vaultAnd)[0]
	if s := TPMPart(damaged); s.Type != "" {
		t.Errorf("the TPM's part: %+v", s)
	}
	if s := BackendPart(damaged); s.Type != "" {
		t.Errorf("Vault's part: %+v", s)
	}
	if got := reader().Binding(damaged); got != "unreadable" {
		t.Errorf("binding %q", got)
	}
	if got := reader().Demands([]seal.Slot{damaged}); len(got) != 0 {
		t.Errorf("demands %v", got)
	}
}
