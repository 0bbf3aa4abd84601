package slots

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// holding returns a machine without a TPM whose open keyring has a recovery slot and these
// slots.
func holding(t *testing.T, amend func(*config.Config), more ...seal.Slot) *node.Node {
	t.Helper()
	n := nodetest.New(t, amend)
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	w, err := recovery.NewWrapper(seal.Memory{}, []string{recipient(t)})
	if err != nil {
		t.Fatal(err)
	}
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	k, err := keyring.New(seal.ClusterID{1}, kek, append([]seal.Slot{slot}, more...), []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	nodetest.Hold(t, n, k)
	return n
}

func recipient(t *testing.T) string {
	t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return identity.Recipient().String()
}

// skipped is the place of a slot that a rotation left out.
func skipped(t *testing.T, kind string) seal.Slot {
	t.Helper()
	s, err := slotview.Skip(seal.Slot{Type: kind, Data: []byte("{}")})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func kinds(n *node.Node) (all []string) {
	for _, s := range n.OpenSlots() {
		all = append(all, s.Type)
	}
	return all
}

// TestAdd: a second recovery slot is added beside the first one, and recovery need not be
// named in unlock.order for it. A refused request leaves the keyring as it was.
func TestAdd(t *testing.T) {
	n := holding(t, nodetest.Opens(seal.TypePKCS11))
	for name, row := range map[string]struct {
		req  admin.AddSlotRequest
		says string
	}{
		"no token":     {admin.AddSlotRequest{Type: seal.TypePKCS11}, "slot add pkcs11: no token is configured"},
		"no recipient": {admin.AddSlotRequest{Type: seal.TypeRecovery}, "slot add recovery: "},
		"a TPM":        {admin.AddSlotRequest{Type: seal.TypeTPM}, "slot add tpm: run kleidi reseal"},
	} {
		if _, err := Add(t.Context(), n, row.req); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := kinds(n); !slices.Equal(got, []string{seal.TypeRecovery}) {
		t.Fatalf("after refusals: %q", got)
	}
	s, err := Add(t.Context(), n, admin.AddSlotRequest{Type: seal.TypeRecovery, Recipients: []string{recipient(t)}})
	if err != nil || s.Revision != 2 || s.Former != "" || len(s.Changes) != 1 || !strings.HasPrefix(s.Changes[0], "the KEK is wrapped by recovery as well: ") {
		t.Errorf("%+v, %v", s, err)
	}
	if got := kinds(n); !slices.Equal(got, []string{seal.TypeRecovery, seal.TypeRecovery}) {
		t.Errorf("%q", got)
	}
}

// TestRemove: which slots can go. The last recovery slot goes only if the operator accepts
// the loss, and the last slot that opens the keyring here never goes.
func TestRemove(t *testing.T) {
	vault := seal.Slot{Type: seal.TypeVault, Data: []byte("{}")}
	unrevoked := seal.Slot{Type: seal.TypeUnrevoked, Data: []byte("{}")}
	withVault := func(c *config.Config) {
		nodetest.Opens(seal.TypeVault)(c)
		c.Vault.Address, c.Vault.Key = "https://127.0.0.1:1", "kleidi"
		c.Vault.Auth.Method, c.Vault.Auth.TokenFile = "token", "/nonexistent/token"
	}
	for name, row := range map[string]struct {
		amend func(*config.Config)
		more  []seal.Slot
		req   admin.RemoveSlotRequest
		says  string
	}{
		"unknown":                {nodetest.Opens(seal.TypeVault), nil, admin.RemoveSlotRequest{Name: "usb"}, "slot remove usb: "},
		"the last recovery slot": {nodetest.Opens(seal.TypeVault), []seal.Slot{vault}, admin.RemoveSlotRequest{Name: "recovery"}, slotview.ErrLastRecovery.Error()},
		"kept copies":            {nodetest.Opens(seal.TypeVault), []seal.Slot{vault, unrevoked}, admin.RemoveSlotRequest{Name: "unrevoked"}, "run kleidi slot forget-copies --ek EK"},
		"the last opener":        {nodetest.Opens(seal.TypeVault), []seal.Slot{vault}, admin.RemoveSlotRequest{Name: "vault"}, "it is the last slot that can open the keyring on this node"},
		"the others don't open":  {withVault, []seal.Slot{vault, skipped(t, seal.TypePKCS11)}, admin.RemoveSlotRequest{Name: "pkcs11"}, "no other slot opens the keyring on this node now"},
	} {
		n := holding(t, row.amend, row.more...)
		before := kinds(n)
		if _, err := Remove(t.Context(), n, row.req); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", name, err)
		}
		if got := kinds(n); !slices.Equal(got, before) {
			t.Errorf("%s: %q is left of %q", name, got, before)
		}
	}
}

// TestRewrap: what has no wrapper here can't be wrapped again, and a slot that a rotation
// skipped holds nothing to wrap.
func TestRewrap(t *testing.T) {
	n := holding(t, nodetest.Opens(seal.TypePKCS11), skipped(t, seal.TypeVault), seal.Slot{Type: seal.TypePKCS11, Data: []byte("{}")})
	for name, row := range map[string]struct {
		req  admin.RewrapSlotRequest
		says string
	}{
		"unknown": {admin.RewrapSlotRequest{Name: "usb"}, "slot rewrap usb: "},
		"skipped": {admin.RewrapSlotRequest{Name: "vault"}, "a rotation skipped this slot, so there is nothing to rewrap"},
		"new key": {admin.RewrapSlotRequest{Name: "recovery", NewKey: true}, "--new-key is for slots of a token or a server that is configured"},
		"away":    {admin.RewrapSlotRequest{Name: "pkcs11"}, "slot rewrap pkcs11: "},
	} {
		if _, err := Rewrap(t.Context(), n, row.req); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	before := n.OpenSlots()
	s, err := Rewrap(t.Context(), n, admin.RewrapSlotRequest{Name: "recovery"})
	after := n.OpenSlots()
	if err != nil || s.Revision != 2 || len(s.Changes) != 1 || len(after) != len(before) || string(after[0].Data) == string(before[0].Data) || n.View.Binding(after[0]) != n.View.Binding(before[0]) {
		t.Errorf("the recovery slot: %+v, %v", s, err)
	}
}

// TestTest: without names, only slots that this node can open are tested, and missing ones.
// A named slot is always tested.
func TestTest(t *testing.T) {
	n := holding(t, nodetest.Opens(seal.TypePKCS11, seal.TypeVault), skipped(t, seal.TypeVault), seal.Slot{Type: seal.TypeKMSPlugin, Data: []byte("{}")})
	for name, row := range map[string]struct {
		ask  []string
		want []string
	}{
		"all":      {nil, []string{"vault", "pkcs11"}}, // unlock.order names a token, and there is no slot
		"recovery": {[]string{"recovery"}, []string{"recovery"}},
		"two":      {[]string{"kms-plugin", "recovery"}, []string{"recovery", "kms-plugin"}},
	} {
		r, err := Test(t.Context(), n, admin.TestSlotsRequest{Names: row.ask})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range r.Slots {
			got = append(got, s.Name)
			if s.Opens || s.ForNextBoot || s.Problem == nil {
				t.Errorf("%s: %+v", name, s)
			}
		}
		if !slices.Equal(got, row.want) {
			t.Errorf("%s: %q, want %q", name, got, row.want)
		}
	}
	if _, err := Test(t.Context(), n, admin.TestSlotsRequest{Names: []string{"usb"}}); err == nil || !strings.Contains(err.Error(), "slot test: ") {
		t.Errorf("unknown: %v", err)
	}
}

// TestUnusable: a slot that a rotation skipped, a wrapper of unlock.order without a slot,
// and a slot whose last test failed. A slot that was not tested is not accused.
func TestUnusable(t *testing.T) {
	token := seal.Slot{Type: seal.TypePKCS11, Data: []byte("{}")}
	n := holding(t, nodetest.Opens(seal.TypePKCS11, seal.TypeKMSPlugin), skipped(t, seal.TypeVault), token)
	k, err := n.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	names := func() (all []string) {
		for _, s := range Unusable(n, k) {
			if s.Problem == nil || s.Problem.Message == "" {
				t.Errorf("%s: no reason", s.Name)
			}
			all = append(all, s.Name)
		}
		slices.Sort(all)
		return all
	}
	if got := names(); !slices.Equal(got, []string{"kms-plugin", "vault"}) {
		t.Errorf("before a test: %q", got)
	}
	TestOne(t.Context(), n, k, "pkcs11", token)
	if got := names(); !slices.Equal(got, []string{"kms-plugin", "pkcs11", "vault"}) {
		t.Errorf("after a test: %q", got)
	}
}

// TestForgetCopies: only an EK that the keyring names can be forgotten.
func TestForgetCopies(t *testing.T) {
	n := holding(t, nodetest.Opens(seal.TypePKCS11))
	if _, err := ForgetCopies(t.Context(), n, admin.ForgetCopiesRequest{EK: "sha256:00"}); err == nil || !strings.Contains(err.Error(), `names no kept copies that open with the TPM of endorsement key "sha256:00"`) {
		t.Errorf("%v", err)
	}
	if got := n.OpenSlots(); len(got) != 1 {
		t.Errorf("%+v", got)
	}
}

// TestFilesAreKept: neither a sealed PIN nor a client key replaces a file, and the PIN is
// not even asked for.
func TestFilesAreKept(t *testing.T) {
	n := nodetest.New(t, nodetest.Opens(seal.TypePKCS11))
	file := filepath.Join(t.TempDir(), "there")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	asked := false
	if _, err := SealPIN(t.Context(), n, file, func() (*seal.Secret, error) { asked = true; return nil, nil }); err == nil || !strings.Contains(err.Error(), "exists; name another file") || asked {
		t.Errorf("PIN: %v, asked %v", err, asked)
	}
	for _, k := range []*VaultKey{{Key: file, Request: file + ".csr"}, {Key: file + ".key", Request: file}} {
		if err := MakeVaultKey(t.Context(), n, k); err == nil || !strings.Contains(err.Error(), file+" exists; name another file") {
			t.Errorf("client key: %v", err)
		}
	}
}
