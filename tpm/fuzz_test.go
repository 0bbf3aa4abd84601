package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// FuzzDemandOf: slots are read before anything about them is proven. An accepted slot
// makes sense: kleidi could seal to its demand, and its digest is the object's.
func FuzzDemandOf(f *testing.F) {
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		f.Fatal(err)
	}
	for _, bank := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
		f.Add(seed(f, counter, bank))
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		f.Fatal(err)
	}
	defer kek.Close()
	state := tpm.BootState{PCR: authpolicy.PCR{Bank: crypto.SHA256, Values: map[int][]byte{4: bytes.Repeat([]byte{4}, 32), 7: bytes.Repeat([]byte{7}, 32)}}}
	imported, err := tpm.WrapFor(tpm.Peer{Node: "beta", EK: "sha256:00", SRK: someSRK(f), Epoch: counter}, kek, state, 3)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(imported.Data))
	f.Add([]byte(`{"form":"sealed-v1","srk":"zz"}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := tpm.DemandOf(seal.Slot{Type: seal.TypeTPM, Data: data}, counter)
		if err != nil {
			if seal.CauseOf(err) != seal.CauseSlotCorrupt {
				t.Errorf("%v: cause %q", err, seal.CauseOf(err))
			}
			return
		}
		if err := d.State.Check(); err != nil {
			t.Error(err)
		}
		var slot struct{ Public []byte }
		if err := json.Unmarshal(data, &slot); err != nil {
			t.Fatal(err)
		}
		digest, err := authpolicy.Terms{d.State.PCR, authpolicy.Epoch{Index: counter.Index(), Name: counter.Name(), AtMost: d.AtMost}}.Digest()
		if err != nil || !bytes.Contains(slot.Public, digest) {
			t.Errorf("the object's authorization policy is another: %v", err)
		}
	})
}

// someSRK is the public area of a storage root key that no TPM holds.
func someSRK(tb testing.TB) []byte {
	tb.Helper()
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	point := key.PublicKey().Bytes()[1:]
	srk := tpm2.ECCSRKTemplate
	setPoint(&srk, point[:32], point[32:])
	return tpm2.Marshal(srk)
}

// FuzzParseSRK: the key comes from anybody. An accepted key has the template, in its
// only encoding. Wrapping for it succeeds or fails with an error.
func FuzzParseSRK(f *testing.F) {
	f.Add(someSRK(f))
	f.Add(tpm2.Marshal(tpm2.RSASRKTemplate))
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		f.Fatal(err)
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { kek.Close() })
	state := tpm.BootState{PCR: authpolicy.PCR{Bank: crypto.SHA256, Values: map[int][]byte{4: bytes.Repeat([]byte{4}, 32)}}}
	f.Fuzz(func(t *testing.T, public []byte) {
		srk, err := tpm.ParseSRK(public)
		slot, wrapErr := tpm.WrapFor(tpm.Peer{Node: "beta", SRK: public, Epoch: counter}, kek, state, 1)
		if err != nil {
			if wrapErr == nil {
				t.Error("a KEK is wrapped for what is no storage root key")
			}
			return
		}
		if !bytes.Equal(tpm2.Marshal(srk), public) || !srk.ObjectAttributes.Restricted || !srk.ObjectAttributes.Decrypt || !srk.ObjectAttributes.FixedTPM {
			t.Errorf("%x is taken for a storage root key", public)
		}
		if wrapErr == nil && slot.Node != "beta" {
			t.Errorf("%+v", slot)
		}
	})
}

// seed is a slot like Wrap's, except for the parts that only a TPM can make.
func seed(f *testing.F, counter *nv.Counter, bank crypto.Hash) []byte {
	f.Helper()
	pcr := authpolicy.PCR{Bank: bank, Values: map[int][]byte{}}
	values := map[int]string{}
	for _, i := range []int{4, 7, 11} {
		pcr.Values[i] = bytes.Repeat([]byte{byte(i)}, bank.Size())
		values[i] = hex.EncodeToString(pcr.Values[i])
	}
	digest, err := authpolicy.Terms{pcr, authpolicy.Epoch{Index: counter.Index(), Name: counter.Name(), AtMost: 3}}.Digest()
	if err != nil {
		f.Fatal(err)
	}
	public := tpm2.Marshal(tpm2.TPMTPublic{Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, AdminWithPolicy: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: digest},
		Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull}}),
		Unique:           tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: make([]byte, 32)})})
	name := map[crypto.Hash]string{crypto.SHA256: "sha256", crypto.SHA384: "sha384"}[bank]
	data, err := json.Marshal(map[string]any{"form": "sealed-v1", "made": "2026-11-21T00:00:00Z", "srk": "000b" + hex.EncodeToString(make([]byte, 32)),
		"ek": "sha256:00", "public": public, "private": make([]byte, 64), "bank": name, "pcrs": values,
		"epoch": map[string]any{"index": counter.Index(), "atMost": 3}, "boot": []any{}})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := tpm.DemandOf(seal.Slot{Type: seal.TypeTPM, Data: data}, counter); err != nil {
		f.Fatalf("the seed is refused: %v", err)
	}
	return data
}
