package node

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
	"github.com/beezy-dev/kleidi/tpm/credential"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestCredentialFiles: a credential of the TPM whose file is missing, or was made by
// nothing of ours, is refused with the command that makes it.
func TestCredentialFiles(t *testing.T) {
	dir := t.TempDir()
	n := newNode(t, func(c *config.Config) {
		c.TPM.Device = filepath.Join(dir, "none")
		c.PKCS11.SealedPINFile, c.Vault.Auth.TPMKeyFile, c.Vault.Auth.CertFile = filepath.Join(dir, "pin"), filepath.Join(dir, "key"), filepath.Join(dir, "cert")
	})
	pin := func() error { _, err := n.sealedPIN(t.Context()); return err }
	certificate := func() error { _, err := n.clientCertificate(t.Context()); return err }
	for name, row := range map[string]struct {
		read func() error
		says []string
	}{
		"the PIN": {pin, []string{"pkcs11.sealedPINFile", "kleidi pkcs11-pin --pin-file FILE --out " + n.Config.PKCS11.SealedPINFile}},
		"the key": {certificate, []string{"vault.auth.tpmKeyFile", "kleidi vault-key --out " + n.Config.Vault.Auth.TPMKeyFile}},
	} {
		err := row.read()
		for _, part := range row.says {
			if seal.CauseOf(err) != seal.CauseCredentials || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %v, want %q", name, err, part)
			}
		}
	}
	for _, path := range []string{n.Config.PKCS11.SealedPINFile, n.Config.Vault.Auth.TPMKeyFile} {
		if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := pin(); err == nil || !strings.Contains(err.Error(), n.Config.PKCS11.SealedPINFile) {
		t.Errorf("a damaged PIN: %v", err)
	}
	if err := certificate(); err == nil || !strings.Contains(err.Error(), "vault.auth.tpmKeyFile: "+n.Config.Vault.Auth.TPMKeyFile) {
		t.Errorf("a damaged key: %v", err)
	}
}

// TestHintNeedsTPM: only an unavailable TPM sends the operator to the other kind of PIN.
func TestHintNeedsTPM(t *testing.T) {
	for cause, hints := range map[seal.Cause]bool{seal.CauseUnavailable: true, seal.CauseBootState: false} {
		err := HintNeedsTPM(seal.Errorf(cause, "see", "refused"))
		if seal.CauseOf(err) != cause || strings.Contains(err.Error(), "set pkcs11.pinFile instead") != hints || !strings.Contains(err.Error(), "see") {
			t.Errorf("%s: %v", cause, err)
		}
	}
	if plain := errors.New("plain"); HintNeedsTPM(plain) != plain {
		t.Error("a plain error has changed")
	}
}

// TestSignedFiles: signed boot states come from every file, of this signer alone. A damaged
// file does not hide the others.
func TestSignedFiles(t *testing.T) {
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	ours, theirs := newKey(), newKey()
	dir := t.TempDir()
	write := func(name string, key crypto.Signer, pcr int) string {
		s, err := bootstate.Sign(key, authpolicy.PCR{Bank: crypto.SHA256, Values: map[int][]byte{pcr: bytes.Repeat([]byte{1}, 32)}}, nil, name)
		if err != nil {
			t.Fatal(err)
		}
		f, err := bootstate.New(s)
		if err != nil {
			t.Fatal(err)
		}
		b, err := f.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	damaged := filepath.Join(dir, "damaged")
	if err := os.WriteFile(damaged, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := newNode(t, func(c *config.Config) {
		c.TPM.BootStates = []string{damaged, filepath.Join(dir, "none"), write("one", ours, 11), write("two", ours, 12), write("three", theirs, 11)}
	})
	key, err := authpolicy.PublicKey(ours.Public())
	if err != nil {
		t.Fatal(err)
	}
	if got := n.signed(tpm.Signer{Key: key}); len(got) != 2 {
		t.Errorf("%d boot states of this signer, want 2", len(got))
	}
	if got := n.signed(tpm.Signer{Key: key, Ref: []byte("another")}); len(got) != 0 {
		t.Errorf("%d boot states of another generation", len(got))
	}
}

// TestDemandOfVerifier: a new slot demands the agreement of the configured key, for this
// cluster and node.
func TestDemandOfVerifier(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	path, cluster := filepath.Join(t.TempDir(), "verifier.pem"), seal.ClusterID{1}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	g := &RemoteGate{&remote.Gate{Node: "cp-1"}, path}
	v, err := g.Demand(cluster)
	if err != nil || v.Cluster != cluster || !bytes.Equal(v.Signer.Ref, remote.PolicyRef(cluster, "cp-1")) || bytes.Equal(v.Signer.Ref, remote.PolicyRef(cluster, "cp-2")) {
		t.Errorf("%+v, %v", v, err)
	}
	if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Demand(cluster); err == nil || !strings.Contains(err.Error(), "tpm.verifier.publicKey: "+path) {
		t.Errorf("damaged: %v", err)
	}
}

// TestSelfTestTimes: before the first test of all slots there is no time, and no result.
func TestSelfTestTimes(t *testing.T) {
	a := seal.Slot{Type: seal.TypePKCS11, Data: []byte("{}")}
	var r SelfTests
	if r.Seconds() != 0 || r.Of(a) != nil {
		t.Errorf("%v, %v", r.Seconds(), r.Of(a))
	}
	r.Record(func() []seal.Slot { return []seal.Slot{a} }, a, admin.SlotTest{Opens: true})
	r.Ended(time.UnixMilli(1500))
	if got := r.Of(a); r.Seconds() != 1.5 || got == nil || !got.Opens {
		t.Errorf("%v, %v", r.Seconds(), got)
	}
}

// TestOnTPM: what the node keeps in the TPM: the anchor, the PIN, the key of a certificate.
// Each stays with this boot's Secure Boot.
func TestOnTPM(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	dir := t.TempDir()
	n := newNode(t, func(c *config.Config) {
		c.TPM.Device, c.TPM.EventLog, c.TPM.UserspaceEventLog = m.Device(), m.EventLog(), m.UserspaceLog()
		c.Anchor.Store = config.AnchorTPM
		c.PKCS11.SealedPINFile, c.Vault.Auth.TPMKeyFile, c.Vault.Auth.CertFile = filepath.Join(dir, "pin"), filepath.Join(dir, "key"), filepath.Join(dir, "cert")
	})
	if _, err := n.TPM.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}

	t.Run("anchor", func(t *testing.T) {
		if err := n.CheckAnchorable(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Anchor.Load(t.Context()); !errors.Is(err, nv.ErrAnchorMissing) {
			t.Errorf("before the first: %v", err)
		}
		kek, err := seal.Memory{}.NewKEK()
		if err != nil {
			t.Fatal(err)
		}
		k, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}}, []keyring.Node{{Name: "cp-1"}}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		anchor := k.Anchor()
		if err := n.Anchor.Replace(t.Context(), anchor); err != nil {
			t.Fatal(err)
		}
		anchor.Revision = 7
		if err := n.Anchor.Save(t.Context(), anchor); err != nil {
			t.Fatal(err)
		}
		if got, err := n.Anchor.Load(t.Context()); err != nil || got.Revision != 7 || got.KeyID != anchor.KeyID {
			t.Errorf("%+v, %v; want %+v", got, err, anchor)
		}
	})

	t.Run("pin", func(t *testing.T) {
		pin, err := seal.Memory{}.Take([]byte("123456"))
		if err != nil {
			t.Fatal(err)
		}
		defer pin.Close()
		blob, err := credential.Seal(t.Context(), n.Gate.Device, n.Gate.Owner, n.Gate.Bank, pin)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(n.Config.PKCS11.SealedPINFile, blob, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := n.sealedPIN(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer got.Close()
		if !got.Equal(pin) {
			t.Error("another PIN")
		}
	})

	t.Run("client certificate", func(t *testing.T) {
		blob, _, err := credential.NewClientKey(t.Context(), n.Gate.Device, n.Gate.Owner, n.Gate.Bank)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(n.Config.Vault.Auth.TPMKeyFile, blob, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := n.clientCertificate(t.Context()); seal.CauseOf(err) != seal.CauseCredentials || !strings.Contains(err.Error(), "put the certificate there that was issued for the key") {
			t.Errorf("without a certificate: %v", err)
		}
		if err := os.WriteFile(n.Config.Vault.Auth.CertFile, []byte("damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := n.clientCertificate(t.Context()); err == nil || !strings.Contains(err.Error(), "vault.auth.certFile: "+n.Config.Vault.Auth.CertFile) {
			t.Errorf("with a damaged one: %v", err)
		}
	})

	t.Run("present boot", func(t *testing.T) {
		state, err := n.Gate.State(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !n.IsPresent(state) {
			t.Error("the boot is not present")
		}
		for i, v := range state.Values {
			other := bytes.Clone(v)
			other[0] ^= 1
			changed := tpm.BootState{PCR: authpolicy.PCR{Bank: state.Bank, Values: map[int][]byte{i: other}}}
			if n.IsPresent(changed) {
				t.Errorf("PCR %d has another value, and the boot is present", i)
			}
		}
		if state.Bank = crypto.SHA384; n.IsPresent(state) {
			t.Error("the values of another bank are present")
		}
	})

	t.Run("attestation", func(t *testing.T) {
		state, err := n.Gate.State(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		kek, err := seal.Memory{}.NewKEK()
		if err != nil {
			t.Fatal(err)
		}
		defer kek.Close()
		slot, err := n.TPM.WrapState(t.Context(), kek, state)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Attest(t.Context(), []seal.Slot{slot}); err != nil {
			t.Errorf("with the TPM: %v", err)
		}
		if err := m.PowerOff(); err != nil {
			t.Fatal(err)
		}
		if err := n.Attest(t.Context(), []seal.Slot{slot}); err == nil {
			t.Error("attested without the TPM")
		}
		if err := (preflight{n.Gate, false}).Attest(t.Context(), []seal.Slot{slot}); err != nil {
			t.Errorf("a machine that uses no TPM asks it: %v", err)
		}
	})
}
