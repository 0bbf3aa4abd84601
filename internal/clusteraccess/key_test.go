package clusteraccess

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

func newAccess(t *testing.T, m *tpmtest.Machine) *Access {
	t.Helper()
	return &Access{Node: "cp-1", Kubeconfig: filepath.Join(t.TempDir(), "cluster.kubeconfig"), Gate: &attest.Gate{
		Node: "cp-1", Bank: crypto.SHA256,
		Attester: attest.Attester{Device: m.TPM(), Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}},
	}}
}

// TestKey: the key is in the TPM while Secure Boot is on, and stays the same. A key that no
// longer signs is replaced, and its refusal says how.
func TestKey(t *testing.T) {
	boot := simboot.Baseline(simboot.UKI)
	m := tpmtest.New(t, boot)
	a := newAccess(t, m)
	first, err := a.takeKey(t.Context(), false)
	if err != nil || !first.inTPM || !first.made {
		t.Fatalf("the first key: %+v, %v", first, err)
	}
	again, err := a.takeKey(t.Context(), false)
	if err != nil || again.made || !sameKey(again.Public(), first.Public()) {
		t.Errorf("the same key again: %+v, %v", again, err)
	}

	other := boot
	other.Dbx = "2026-01-01"
	m.Reboot(other)
	refusal := signs(again)
	if e := seal.CauseOf(refusal); e != seal.CauseCredentials || !strings.Contains(refusal.Error(), "kleidi cluster setup --kubeconfig FILE") || strings.Contains(refusal.Error(), "vault") {
		t.Errorf("after a change of Secure Boot's keys: %v", refusal)
	}
	second, err := a.takeKey(t.Context(), false)
	if err != nil || !second.inTPM || !second.made || signs(second) != nil {
		t.Errorf("after a change of Secure Boot's keys: %+v, %v", second, err)
	}

	off := boot
	off.SecureBoot = false
	m.Reboot(off)
	file, err := a.takeKey(t.Context(), false)
	if err != nil || file.inTPM || !file.made || !strings.Contains(file.whyFile, "Secure Boot") {
		t.Fatalf("without Secure Boot: %+v, %v", file, err)
	}
	if err := file.removeOther(a); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(second.path); err == nil {
		t.Error("the file of the key in the TPM stays")
	}
	again, err = a.takeKey(t.Context(), true)
	if err != nil || again.made || !sameKey(again.Public(), file.Public()) {
		t.Errorf("the same file again: %+v, %v", again, err)
	}
	if err := os.Chmod(file.path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := a.takeKey(t.Context(), true); err == nil {
		t.Error("a key that others may read is used")
	}
}

// TestRequest: a request is for the node's user alone. A request of another key, for
// another user or for another signer is not the node's.
func TestRequest(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	a := newAccess(t, m)
	k, err := a.takeKey(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	b, err := a.request(k)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	q, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || q.Subject.String() != "CN=kleidi:node:cp-1" {
		t.Fatalf("%v, %v", q.Subject, err)
	}
	good := &signingRequest{}
	good.Spec.Request, good.Spec.SignerName = b, signer
	if !a.isFor(good, k.Public()) {
		t.Error("the node's own request is refused")
	}
	other := newAccess(t, m)
	otherKey, err := other.takeKey(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	other.Node = "cp-2"
	otherUser, err := other.request(k)
	if err != nil {
		t.Fatal(err)
	}
	for what, r := range map[string]*signingRequest{"another user's": with(good, otherUser, signer), "another signer's": with(good, b, "kubernetes.io/kubelet-serving"), "nothing": with(good, nil, signer)} {
		if a.isFor(r, k.Public()) {
			t.Errorf("%s request is taken", what)
		}
	}
	if a.isFor(good, otherKey.Public()) {
		t.Error("a request of another key is taken")
	}
}

func with(r *signingRequest, request []byte, signerName string) *signingRequest {
	c := *r
	c.Spec.Request, c.Spec.SignerName = request, signerName
	return &c
}
