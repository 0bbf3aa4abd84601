package tpmtest_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// hash is an operation whose command carries known bytes.
func hash(tp transport.TPM) error {
	_, err := tpm2.Hash{Data: tpm2.TPM2BMaxBuffer{Buffer: []byte("crosses the bus")},
		HashAlg: tpm2.TPMAlgSHA256, Hierarchy: tpm2.TPMRHNull}.Execute(tp)
	return err
}

// TestProxyRecords: the proxy sees unencrypted data in both directions, and no
// encrypted data.
func TestProxyRecords(t *testing.T) {
	p := tpmtest.NewProxy(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)))
	d := p.TPM(0)
	var random []byte
	get := func(sessions ...tpm2.Session) func(transport.TPM) error {
		return func(tp transport.TPM) error {
			r, err := tpm2.GetRandom{BytesRequested: 16}.Execute(tp, sessions...)
			if err == nil {
				random = r.RandomBytes.Buffer
			}
			return err
		}
	}
	if err := d.Do(t.Context(), get()); err != nil {
		t.Fatal(err)
	}
	if !p.Saw(random) {
		t.Error("a plain response is not seen")
	}
	if err := d.Do(t.Context(), hash); err != nil {
		t.Fatal(err)
	}
	if !p.Saw([]byte("crosses the bus")) {
		t.Error("a plain command is not seen")
	}
	encrypted := tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.AESEncryption(128, tpm2.EncryptOut))
	if err := d.Do(t.Context(), get(encrypted)); err != nil {
		t.Fatal(err)
	}
	if p.Saw(random) {
		t.Error("an encrypted response is seen")
	}
	if n := p.Count(tpm2.TPMCCGetRandom); n != 2 {
		t.Errorf("%d TPM2_GetRandom counted, want 2", n)
	}
	p.Forget()
	if len(p.Traffic()) != 0 {
		t.Error("Forget forgets nothing")
	}
}

// TestFaultIsAimed: a fault hits its command, after and as often as it says.
func TestFaultIsAimed(t *testing.T) {
	p := tpmtest.NewProxy(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)))
	d := p.TPM(0)
	p.Inject(tpmtest.Fault{On: tpm2.TPMCCHash, After: 1, Times: 2, Do: tpmtest.Code(tpm2.TPMRCLockout)})
	for i, wantFault := range []bool{false, true, true, false} {
		err := d.Do(t.Context(), hash)
		if errors.Is(err, tpm2.TPMRCLockout) != wantFault || !wantFault && err != nil {
			t.Errorf("command %d: %v, want a fault: %t", i, err, wantFault)
		}
	}
	if n := p.Count(tpm2.TPMCCHash); n != 4 {
		t.Errorf("%d commands, want 4", n)
	}
}

// TestChange: a real response can be altered on its way.
func TestChange(t *testing.T) {
	p := tpmtest.NewProxy(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)))
	p.Inject(tpmtest.Fault{On: tpm2.TPMCCGetRandom, Do: tpmtest.Change(func(b []byte) []byte {
		return append(b[:12:12], bytes.Repeat([]byte{7}, 8)...)
	})})
	err := p.TPM(0).Do(t.Context(), func(tp transport.TPM) error {
		r, err := tpm2.GetRandom{BytesRequested: 8}.Execute(tp)
		if err == nil && !bytes.Equal(r.RandomBytes.Buffer, bytes.Repeat([]byte{7}, 8)) {
			t.Errorf("%x came", r.RandomBytes.Buffer)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
