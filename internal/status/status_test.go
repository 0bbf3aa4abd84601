package status

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// TestDescribeKeys: the keys are shown from the current one back to the oldest.
func TestDescribeKeys(t *testing.T) {
	at := func(hour int) time.Time { return time.Date(2026, 1, 1, hour, 0, 0, 0, time.UTC) }
	i := keyring.Info{ClusterID: seal.ClusterID{0xab}, Revision: 7, Current: keyring.KEKInfo{KeyID: "k1-c", Created: at(3)},
		Staged: &keyring.KEKInfo{KeyID: "k1-d", Created: at(4)}}
	i.Retired = make([]keyring.RetiredInfo, 2)
	i.Retired[0].KeyID, i.Retired[1].KeyID = "k1-a", "k1-b"
	i.Retired[0].Retired = at(2)
	var r admin.StatusReport
	describe(&r, i)
	var got string
	for _, k := range r.Keys {
		got += string(k.KeyID) + ":" + k.Role + " "
	}
	if got != "k1-c:current k1-d:staged k1-b:retired k1-a:retired " || r.Keys[3].Retired != at(2) || r.Keys[1].Created != at(4) {
		t.Errorf("%q, %+v", got, r.Keys)
	}
	if r.CurrentKeyID != "k1-c" || r.Revision != 7 || r.ClusterID != (seal.ClusterID{0xab}).String() {
		t.Errorf("%+v", r)
	}
	i.Staged = nil
	r = admin.StatusReport{}
	if describe(&r, i); len(r.Keys) != 3 {
		t.Errorf("without a staged key: %+v", r.Keys)
	}
}

// TestOnlyAttestation: of the reasons why a keyring is locked, only a refusal by the gate
// is a problem of the attestation.
func TestOnlyAttestation(t *testing.T) {
	for cause, want := range map[seal.Cause]bool{seal.CauseAttestation: true, seal.CauseBootPolicy: true, seal.CauseBootState: false, seal.CauseUnavailable: false, "": false} {
		var err error = seal.Errorf(cause, "", "no")
		if cause == "" {
			err = errors.New("no")
		}
		if got := onlyAttestation(err) != nil; got != want {
			t.Errorf("%q: %v", cause, got)
		}
	}
	if onlyAttestation(nil) != nil {
		t.Error("no error is one")
	}
}

// TestSlotsThatAreNotTried: for a slot that it doesn't try, status says neither that it
// opens nor that it doesn't. A missing slot doesn't open.
func TestSlotsThatAreNotTried(t *testing.T) {
	n := nodetest.New(t, func(c *config.Config) {
		c.Vault.Address, c.Vault.Key = "https://vault.invalid:8200", "kleidi"
		c.Vault.Auth.Method, c.Vault.Auth.TokenFile = "token", "/etc/kleidi/token"
	})
	for name, row := range map[string]struct {
		slot  seal.Slot
		try   admin.Try
		opens any // nil, or a bool
	}{
		"no try":              {seal.Slot{Type: seal.TypeTPM, Node: "cp-1", Data: []byte("{}")}, admin.TryNone, nil},
		"another node's":      {seal.Slot{Type: seal.TypeTPM, Node: "cp-2", Data: []byte("{}")}, admin.TryTPM, nil},
		"a server's, no try":  {seal.Slot{Type: seal.TypeVault, Data: []byte("{}")}, admin.TryTPM, nil},
		"not configured":      {seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}, admin.TryTPM, nil},
		"missing":             {seal.Slot{Type: seal.TypeSkipped, Data: []byte(`{"type":"vault"}`)}, admin.TryNone, false},
		"refused by the gate": {seal.Slot{Type: seal.TypeTPM, Node: "cp-1", Data: []byte("{}")}, admin.TryTPM, false},
	} {
		r := reportSlot(t.Context(), n, []seal.Slot{row.slot}, row.slot, "k1-a", seal.ClusterID{1}.String(), row.try, seal.Errorf(seal.CauseBootPolicy, "boot the old kernel", "refused"))
		if row.opens == nil && (r.Opens != nil || r.Problem != nil) {
			t.Errorf("%s: %v, %+v", name, *r.Opens, r.Problem)
		}
		if row.opens != nil && (r.Opens == nil || *r.Opens != row.opens || r.Problem == nil) {
			t.Errorf("%s: %+v", name, r)
		}
	}
	server := seal.Slot{Type: seal.TypeVault, Data: []byte("{}")}
	n.Config.Unlock.RequireAttestation = true
	if r := reportSlot(t.Context(), n, []seal.Slot{server}, server, "k1-a", seal.ClusterID{1}.String(), admin.TryAll, errors.New("refused")); r.Problem == nil || r.Problem.Message != "refused" {
		t.Errorf("a server's slot, where the gate must pass for it too: %+v", r)
	}
	if r := reportAttestation(n, nil); r != nil {
		t.Errorf("a gate that was never asked: %+v", r)
	}
	if r := reportAttestation(n, errors.New("refused")); r == nil || r.Passed || r.Problem == nil {
		t.Errorf("a refusal: %+v", r)
	}
	if s := Suspension(n, []seal.Slot{{Type: seal.TypeTPM, Node: "cp-1", Data: []byte("{}")}, {Type: seal.TypeVault}}); s != nil {
		t.Errorf("%+v", s)
	}
}

// TestAlone: without serve no keyring is open, and Since is zero. A missing keyring is
// the problem to show, with the way to make one.
func TestAlone(t *testing.T) {
	n := nodetest.New(t)
	r, err := Alone(t.Context(), n, admin.StatusRequest{Try: admin.TryAll})
	if err != nil {
		t.Fatal(err)
	}
	if r.Problem == nil || !strings.Contains(r.Problem.Hint, "kleidi init") || r.State != admin.Locked || !r.Since.IsZero() {
		t.Errorf("%+v, %+v", r, r.Problem)
	}
}
