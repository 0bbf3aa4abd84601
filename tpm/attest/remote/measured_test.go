package remote_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// extend extends a PCR, as the kernel does for IMA with PCR 10.
func extend(tp transport.TPM, pcr tpm2.TPMHandle) error {
	_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: pcr, Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}}}.Execute(tp)
	return err
}

// TestMeasuredMeanwhile: in every exchange with the verifier a PCR is extended. If no
// slot demands that PCR, the slot still opens with the first exchange. If the slot
// demands it, kleidi notices the change, even during the exchange, and does not ask the
// verifier for a boot state that the TPM would refuse.
func TestMeasuredMeanwhile(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := authpolicy.PublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	cluster := seal.ClusterID{1}
	v := &tpm.Verifier{Signer: tpm.Signer{Key: public, Ref: remote.PolicyRef(cluster, "n")}, Cluster: cluster}
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	asked, meanwhile := 0, func(transport.TPM) error { return nil }
	ask := func(_ context.Context, tp transport.TPM, _ *keys.SRK, v tpm.Verifier, nonce []byte) (tpm2.TPMTSignature, error) {
		asked++
		hash, err := authpolicy.SignedHash(nonce, v.Ref)
		if err != nil {
			return tpm2.TPMTSignature{}, err
		}
		raw, err := key.Sign(rand.Reader, hash, crypto.SHA256)
		if err := errors.Join(err, meanwhile(tp)); err != nil {
			return tpm2.TPMTSignature{}, err
		}
		return authpolicy.Signature(key.Public(), raw)
	}
	w, err := tpm.NewWrapper(tpm.Config{Device: m.TPM(), Counter: counter, Node: "n", Ask: ask}).With(tpm.SealOptions{Verifier: v})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	var values map[int][]byte
	if err := m.TPM().Do(t.Context(), func(tp transport.TPM) (err error) {
		values, err = keys.ReadPCRs(tp, crypto.SHA256, []int{4, 7, 11})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	slot, err := w.WrapState(t.Context(), kek, tpm.BootState{PCR: authpolicy.PCR{Bank: crypto.SHA256, Values: values}})
	if err != nil {
		t.Fatal(err)
	}
	unwrap := func() error {
		asked = 0
		got, err := w.Unwrap(t.Context(), slot)
		if err == nil {
			got.Close()
		}
		return err
	}
	if err := unwrap(); err != nil || asked != 1 {
		t.Fatalf("nothing is measured: %d exchanges, %v", asked, err)
	}
	meanwhile = func(tp transport.TPM) error { return extend(tp, 10) }
	if err := unwrap(); err != nil || asked != 1 {
		t.Errorf("IMA measures in every exchange: %d exchanges, %v", asked, err)
	}
	meanwhile = func(tp transport.TPM) error { return extend(tp, 11) }
	if err := unwrap(); seal.CauseOf(err) != seal.CauseBootState || asked != 1 {
		t.Errorf("PCR 11 moves in the exchange: %d exchanges, %v", asked, err)
	}
	meanwhile = func(transport.TPM) error { return nil }
	if err := unwrap(); seal.CauseOf(err) != seal.CauseBootState || asked != 0 {
		t.Errorf("PCR 11 has moved: %d exchanges, %v", asked, err)
	}
}
