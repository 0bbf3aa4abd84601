package slots

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// TestWrapperFor: which requests to add a slot find a wrapper, and what the other
// requests lack.
func TestWrapperFor(t *testing.T) {
	secret, recipient, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	bare := nodetest.New(t)
	withVault := nodetest.New(t, func(c *config.Config) {
		c.Vault.Address, c.Vault.Key = "https://vault.example:8200", "kleidi"
		c.Vault.Auth.Method, c.Vault.Auth.TokenFile = "token", "/etc/kleidi/token"
	})
	for name, row := range map[string]struct {
		n    *node.Node
		req  admin.AddSlotRequest
		says string
	}{
		"recovery":            {bare, admin.AddSlotRequest{Type: seal.TypeRecovery, Recipients: []string{recipient}}, ""},
		"recovery for nobody": {bare, admin.AddSlotRequest{Type: seal.TypeRecovery}, "recipient"},
		"tpm":                 {bare, admin.AddSlotRequest{Type: seal.TypeTPM}, "run kleidi reseal"},
		"two of two":          {bare, admin.AddSlotRequest{Type: seal.TypeTPMAndPKCS11}, "run kleidi reseal"},
		"no token":            {bare, admin.AddSlotRequest{Type: seal.TypePKCS11}, "no token is configured"},
		"no server":           {bare, admin.AddSlotRequest{Type: seal.TypeVault}, "no server is configured"},
		"vault":               {withVault, admin.AddSlotRequest{Type: seal.TypeVault}, ""},
		"vault, a new key":    {withVault, admin.AddSlotRequest{Type: seal.TypeVault, GenerateKey: true}, "--generate-key is for pkcs11 alone"},
		"unknown":             {bare, admin.AddSlotRequest{Type: "usb"}, "there is no such wrapper"},
	} {
		w, err := wrapperFor(row.n, row.req)
		switch {
		case row.says == "" && (err != nil || w.Type() != row.req.Type):
			t.Errorf("%s: %v", name, err)
		case row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)):
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestReportRemoved: a removed slot is never reported as revoked, and the loss of the
// last recovery slot is reported.
func TestReportRemoved(t *testing.T) {
	slot := func(kind string) seal.Slot { return seal.Slot{Type: kind} }
	for name, row := range map[string]struct {
		gone seal.Slot
		rest []seal.Slot
		says []string
	}{
		"vault":         {slot(seal.TypeVault), nil, []string{"kept copies of it still open the KEK"}},
		"placeholder":   {slot(seal.TypeSkipped), nil, []string{"it held no slot"}},
		"recovery":      {slot(seal.TypeRecovery), []seal.Slot{slot(seal.TypeTPM), slot(seal.TypeRecovery)}, []string{"kept copies"}},
		"last recovery": {slot(seal.TypeRecovery), []seal.Slot{slot(seal.TypeTPM)}, []string{"kept copies", "NO RECOVERY SLOT IS LEFT"}},
	} {
		got := reportRemoved(row.gone, row.rest)
		if len(got) != len(row.says) {
			t.Fatalf("%s: %q", name, got)
		}
		for i, says := range row.says {
			if !strings.Contains(got[i], says) {
				t.Errorf("%s: %q does not say %q", name, got[i], says)
			}
		}
	}
}

// TestSelfTested: the self-test opens the slots that depend on a token or a server.
func TestSelfTested(t *testing.T) {
	n := nodetest.New(t)
	for kind, want := range map[string]bool{seal.TypePKCS11: true, seal.TypeVault: true, seal.TypeTPM: false, seal.TypeRecovery: false, seal.TypeSkipped: false} {
		if got := SelfTested(n, seal.Slot{Type: kind}); got != want {
			t.Errorf("%s: %v", kind, got)
		}
	}
}

// TestCertificateRequest: the request carries the name, and is signed by its own key.
func TestCertificateRequest(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := certificateRequest(key, "cp-1")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	r, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || r.CheckSignature() != nil || r.Subject.CommonName != "cp-1" || !key.PublicKey.Equal(r.PublicKey) {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestNewKey: only a slot that a token or a server made can be remade with a new key.
func TestNewKey(t *testing.T) {
	n := nodetest.New(t)
	for _, kind := range []string{seal.TypeTPM, seal.TypeRecovery, seal.TypePKCS11, seal.TypeVault} { // no backend, or no configured one
		if _, err := rewrapByNewKey(t.Context(), n, nil, seal.Slot{Type: kind}); err == nil || !strings.Contains(err.Error(), "--new-key is for") {
			t.Errorf("%s: %v", kind, err)
		}
	}
}
