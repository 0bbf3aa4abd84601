package slots

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/foundingtest"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/credential"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestAddBackend: a backend has one slot. A key other than the one that made it replaces no
// slot, and a slot that unlock.order does not name opens nothing at start, which the result
// says.
func TestAddBackend(t *testing.T) {
	const idle = "it opens nothing at start until unlock.order names kms-plugin"
	for name, row := range map[string]struct {
		amend func(*nodetest.Plugin) func(*config.Config)
		idle  bool
	}{
		"in unlock.order":     {func(p *nodetest.Plugin) func(*config.Config) { return p.Opens }, false},
		"not in unlock.order": {func(p *nodetest.Plugin) func(*config.Config) { return p.Configured }, true},
	} {
		p := nodetest.NewPlugin(t)
		n := holding(t, row.amend(p))
		var last []byte
		for range 2 {
			s, err := Add(t.Context(), n, admin.AddSlotRequest{Type: seal.TypeKMSPlugin})
			if err != nil || slices.Contains(s.Changes, idle) != row.idle {
				t.Fatalf("%s: %+v, %v", name, s, err)
			}
			if got := kinds(n); !slices.Equal(got, []string{seal.TypeRecovery, seal.TypeKMSPlugin}) {
				t.Errorf("%s: %q", name, got)
			}
			last = n.OpenSlots()[1].Data
		}
		p.Replace()
		_, err := Add(t.Context(), n, admin.AddSlotRequest{Type: seal.TypeKMSPlugin})
		if err == nil || !strings.Contains(err.Error(), "its key may have been replaced") || string(n.OpenSlots()[1].Data) != string(last) {
			t.Errorf("%s: another key: %v", name, err)
		}
	}
}

// TestRewrapBackend: a slot is wrapped again by the key that made it. Another key takes its
// place only with --new-key, and the result warns of kept copies.
func TestRewrapBackend(t *testing.T) {
	p := nodetest.NewPlugin(t)
	n := holding(t, p.Opens)
	if _, err := Add(t.Context(), n, admin.AddSlotRequest{Type: seal.TypeKMSPlugin}); err != nil {
		t.Fatal(err)
	}
	opens := func() bool {
		t.Helper()
		k, err := n.Unlocker.Keyring()
		if err != nil {
			t.Fatal(err)
		}
		return TestOne(t.Context(), n, k, "kms-plugin", k.Slots()[1]).Opens
	}
	before := n.OpenSlots()[1].Data
	if s, err := Rewrap(t.Context(), n, admin.RewrapSlotRequest{Name: "kms-plugin"}); err != nil || len(s.Changes) != 1 || string(n.OpenSlots()[1].Data) == string(before) || !opens() {
		t.Errorf("%+v, %v", s, err)
	}
	p.Replace()
	if opens() {
		t.Error("another key opens the slot")
	}
	if _, err := Rewrap(t.Context(), n, admin.RewrapSlotRequest{Name: "kms-plugin"}); err == nil || !strings.Contains(err.Error(), "run kleidi slot rewrap kms-plugin --new-key") {
		t.Errorf("another key: %v", err)
	}
	s, err := Rewrap(t.Context(), n, admin.RewrapSlotRequest{Name: "kms-plugin", NewKey: true})
	if err != nil || len(s.Changes) != 2 || !strings.HasPrefix(s.Changes[1], "kept copies of the former one still open with the key that made it") || !opens() {
		t.Errorf("--new-key: %+v, %v", s, err)
	}
}

// TestRemoveOthers: whoever removes the last recovery slot accepts the loss, and is warned
// in capitals. A placeholder held no slot, so no copy of it opens anything.
func TestRemoveOthers(t *testing.T) {
	n := holding(t, nodetest.NewPlugin(t).Opens, skipped(t, seal.TypeVault))
	if _, err := Add(t.Context(), n, admin.AddSlotRequest{Type: seal.TypeKMSPlugin}); err != nil {
		t.Fatal(err)
	}
	s, err := Remove(t.Context(), n, admin.RemoveSlotRequest{Name: "vault"})
	if err != nil || s.Owed || len(s.Changes) == 0 || !strings.HasPrefix(s.Changes[0], "the placeholder is gone from the keyring; it held no slot") {
		t.Errorf("a placeholder: %+v, %v", s, err)
	}
	s, err = Remove(t.Context(), n, admin.RemoveSlotRequest{Name: "recovery", AcceptDataLoss: true})
	if err != nil || len(s.Changes) < 2 || !strings.Contains(s.Changes[0], "kept copies of it still open the KEK: run kleidi rotate") || !strings.HasPrefix(s.Changes[1], "NO RECOVERY SLOT IS LEFT: ") {
		t.Errorf("the last recovery slot: %+v, %v", s, err)
	}
	if got := kinds(n); !slices.Equal(got, []string{seal.TypeKMSPlugin}) {
		t.Errorf("%q", got)
	}
}

// TestRemoveTPM: the TPM refuses a removed slot of its own, kept copies included. While
// unlock.order names the TPM, the result says that it has no slot.
func TestRemoveTPM(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	p := nodetest.NewPlugin(t)
	n := nodetest.New(t, nodetest.OnTPM(m), p.Configured, func(c *config.Config) {
		c.Unlock.Order, c.Unlock.RequireAttestation = []string{seal.TypeTPM, seal.TypeKMSPlugin}, false
	})
	foundingtest.FoundOpen(t, n)
	gone := n.OpenSlots()[0]
	s, err := Remove(t.Context(), n, admin.RemoveSlotRequest{Name: "tpm"})
	if err != nil || s.Owed || !slices.Contains(s.Changes, revokedByTPM) || !slices.ContainsFunc(s.Changes, func(c string) bool { return strings.Contains(c, "unlock.order") }) {
		t.Errorf("%+v, %v", s, err)
	}
	if got := kinds(n); !slices.Equal(got, []string{seal.TypeKMSPlugin, seal.TypeRecovery}) {
		t.Errorf("%q", got)
	}
	if kek, err := n.TPM.Unwrap(t.Context(), gone); err == nil {
		kek.Close()
		t.Error("a kept copy opens")
	}
}

// TestCredentials: what pkcs11-pin and vault-key leave: a PIN that only this TPM unseals,
// and a key with a request of its name. A failure leaves no file.
func TestCredentials(t *testing.T) {
	n := nodetest.New(t, nodetest.OnTPM(tpmtest.New(t, simboot.Baseline(simboot.UKI))))
	dir := t.TempDir()
	absent := func(path string) {
		t.Helper()
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is left", path)
		}
	}

	file, ended := filepath.Join(dir, "pin"), errors.New("the input ended")
	if _, err := SealPIN(t.Context(), n, file, func() (*seal.Secret, error) { return nil, ended }); !errors.Is(err, ended) {
		t.Errorf("no PIN: %v", err)
	}
	absent(file)
	r, err := SealPIN(t.Context(), n, file, func() (*seal.Secret, error) { return n.Memory.Take([]byte("123456")) })
	if err != nil || r.File != file || !slices.Equal(r.PCRs, []int{7}) {
		t.Fatalf("%+v, %v", r, err)
	}
	blob, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pin, err := credential.Unseal(t.Context(), n.Gate.Device, n.Gate.Owner, n.Memory, blob)
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Close()
	pin.With(func(b []byte) {
		if string(b) != "123456" {
			t.Error("another PIN is sealed")
		}
	})

	k := &VaultKey{Key: filepath.Join(dir, "key"), Request: filepath.Join(dir, "none", "csr"), Name: "cp-1.example"}
	if err := MakeVaultKey(t.Context(), n, k); err == nil {
		t.Error("a request in no folder")
	}
	absent(k.Key)
	k.Request = filepath.Join(dir, "csr")
	if err := MakeVaultKey(t.Context(), n, k); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(k.Request)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	q, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || q.CheckSignature() != nil || q.Subject.CommonName != "cp-1.example" {
		t.Errorf("%+v, %v", q, err)
	}
}
