package credential_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/credential"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// newClientKey makes a client key in the machine's TPM.
func (n *node) newClientKey() (blob []byte, public *ecdsa.PublicKey) {
	n.Helper()
	blob, key, err := credential.NewClientKey(n.Context(), n.Device, n.Owner, crypto.SHA256)
	if err != nil {
		n.Fatal(err)
	}
	return blob, key.(*ecdsa.PublicKey)
}

// sign signs with what a client key's file holds.
func (n *node) sign(blob []byte) (digest, signature []byte, err error) {
	n.Helper()
	signer, err := credential.ClientSigner(n.Context(), n.Device, n.Owner, blob)
	if err != nil {
		return nil, nil, err
	}
	d := sha256.Sum256([]byte(rand.Text()))
	signature, err = signer.Sign(nil, d[:], crypto.SHA256)
	return d[:], signature, err
}

func (n *node) signs(blob []byte, public *ecdsa.PublicKey) {
	n.Helper()
	digest, signature, err := n.sign(blob)
	if err != nil {
		n.Fatal(err)
	}
	if !ecdsa.VerifyASN1(public, digest, signature) {
		n.Error("the signature does not verify")
	}
}

// signsNot demands a refusal with the cause, a hint and these words.
func (n *node) signsNot(blob []byte, cause seal.Cause, words ...string) error {
	n.Helper()
	_, signature, err := n.sign(blob)
	if err == nil {
		n.Errorf("it signs: %x", signature)
		return nil
	}
	n.Want(err, cause, words...)
	return err
}

// TestClientKey: a key signs, even after a reboot and with another kernel, and leaves
// nothing in the TPM.
func TestClientKey(t *testing.T) {
	n := newNode(t)
	blob, public := n.newClientKey()
	if len(blob) > credential.MaxClientKey/2 {
		t.Errorf("the file has %d bytes; %d is too small a limit", len(blob), credential.MaxClientKey)
	}
	for range 4 { // a TPM without a resource manager has room for three objects
		n.signs(blob, public)
	}
	b := n.Machine.Current()
	b.Kernel, b.Firmware = "6.13.1", "edk2 2099.01"
	n.Machine.Reboot(b)
	n.signs(blob, public)
	another, otherPublic := n.newClientKey()
	if bytes.Equal(blob, another) || public.Equal(otherPublic) {
		t.Error("the same key was made twice")
	}
	n.Must(nodetest.LockOut)
	n.signs(blob, public)
	n.signs(another, otherPublic)
}

// TestClientKeyIsBoundToSecureBoot: every change of PCR 7 ends the key's use, until PCR
// 7 has its old value again.
func TestClientKeyIsBoundToSecureBoot(t *testing.T) {
	n := newNode(t)
	blob, public := n.newClientKey()
	was := n.Machine.Current()
	for name, change := range map[string]func(*simboot.Boot){
		"Secure Boot off": func(b *simboot.Boot) { b.SecureBoot = false },
		"other keys":      func(b *simboot.Boot) { b.Keys = "somebody else" },
		"dbx":             func(b *simboot.Boot) { b.Dbx = "2019-01-01" },
	} {
		b := was
		change(&b)
		n.Machine.Reboot(b)
		if err := n.signsNot(blob, seal.CauseCredentials, "bound to PCR 7", "make a new one with kleidi vault-key"); !errors.Is(err, authpolicy.ErrBootState) {
			t.Errorf("%s: %v", name, err)
		}
		// An attacker who talks to the TPM directly has no other way to sign.
		n.Must(func(tp transport.TPM) error { return signsWithout(n, tp, blob) })
		fresh, freshPublic := n.newClientKey()
		n.signs(fresh, freshPublic)
	}
	n.Machine.Reboot(was)
	n.signs(blob, public)
}

// signsWithout tries to sign with a password, and with a session that satisfied
// nothing, and to take the key out of the TPM.
func signsWithout(n *node, tp transport.TPM, blob []byte) error {
	var k struct{ Public, Private []byte }
	if err := json.Unmarshal(blob, &k); err != nil {
		return err
	}
	satisfyNothing := func(transport.TPM, tpm2.TPMISHPolicy, tpm2.TPM2BNonce) error { return nil }
	return keys.WithSRK(tp, n.Owner, nil, func(srk *keys.SRK) error {
		parent := tpm2.AuthHandle{Handle: srk.Handle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)}
		key, err := tpm2.Load{ParentHandle: parent, InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](k.Public), InPrivate: tpm2.TPM2BPrivate{Buffer: k.Private}}.Execute(tp)
		if err != nil {
			return err
		}
		defer func() { _, _ = tpm2.FlushContext{FlushHandle: key.ObjectHandle}.Execute(tp) }()
		auths := map[string]tpm2.Session{"a password": tpm2.PasswordAuth(nil), "an empty session": tpm2.Policy(tpm2.TPMAlgSHA256, 16, satisfyNothing)}
		for name, auth := range auths {
			handle := tpm2.AuthHandle{Handle: key.ObjectHandle, Name: key.Name, Auth: auth}
			_, err := tpm2.Sign{KeyHandle: handle, Digest: tpm2.TPM2BDigest{Buffer: make([]byte, 32)}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
				Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck}}.Execute(tp)
			if !errors.Is(err, tpm2.TPMRCAuthUnavailable) && !errors.Is(err, tpm2.TPMRCPolicyFail) {
				n.Errorf("TPM2_Sign with %s: %v", name, err)
			}
			_, err = tpm2.ObjectChangeAuth{ObjectHandle: handle, ParentHandle: tpm2.NamedHandle{Handle: srk.Handle, Name: srk.Name},
				NewAuth: tpm2.TPM2BAuth{Buffer: []byte("new")}}.Execute(tp)
			if err == nil {
				n.Errorf("TPM2_ObjectChangeAuth with %s succeeds", name)
			}
		}
		return nil
	})
}

// TestClientKeyOfAnotherTPM: the file is useless there, and after TPM2_Clear.
func TestClientKeyOfAnotherTPM(t *testing.T) {
	n, other := newNode(t), newNode(t)
	blob, _ := n.newClientKey()
	other.signsNot(blob, seal.CauseCredentials, "another TPM", "make a new one with kleidi vault-key")
	// The file is useless even if it names the other TPM's storage root key as its
	// parent.
	theirs, _ := other.newClientKey()
	other.signsNot(edit(t, blob, "srk", member(t, theirs, "srk")), seal.CauseCredentials, "TPM2_Load", "kleidi vault-key")
	if err := n.Machine.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.signsNot(blob, seal.CauseCredentials, "cleared", "kleidi vault-key")
}

// TestDamagedClientKey: each byte of the file, and each member.
func TestDamagedClientKey(t *testing.T) {
	n := newNode(t)
	blob, _ := n.newClientKey()
	n.Proxy.Forget()
	private, err := json.Marshal(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"empty": {}, "no object": []byte("null\n"), "cut": blob[:len(blob)-3], "no newline": blob[:len(blob)-1], "trailing": append(bytes.Clone(blob), '\n'),
		"large": append(bytes.Clone(blob), bytes.Repeat([]byte(" "), credential.MaxClientKey)...), "unknown member": bytes.Replace(blob, []byte("{"), []byte(`{"x":1,`), 1),
		"twice": bytes.Replace(blob, []byte("{"), []byte(`{"form":"client-key-v1",`), 1), "other form": edit(t, blob, "form", `"client-key-v2"`),
		"no parent": edit(t, blob, "srk", `""`), "PCR 7": edit(t, blob, "pcr7", `"`+strings.Repeat("11", 32)+`"`), "all zero": edit(t, blob, "pcr7", `"`+strings.Repeat("00", 32)+`"`),
		"bank": edit(t, blob, "bank", `"sha384"`), "no bank": edit(t, blob, "bank", `"sha1"`), "public": edit(t, blob, "public", string(private)),
	} {
		if _, err := credential.ClientSigner(t.Context(), n.Device, n.Owner, b); err == nil {
			t.Errorf("%s: accepted", name)
		} else {
			n.Want(err, seal.CauseCredentials, "the file of the client key is damaged", "kleidi vault-key")
		}
	}
	if seen := len(n.Proxy.Traffic()); seen != 0 {
		t.Errorf("the TPM got %d commands for damaged files", seen)
	}
	n.signsNot(edit(t, blob, "private", string(private)), seal.CauseCredentials, "damaged: TPM2_Load", "kleidi vault-key")
	// A key of another kind: one that anybody may use.
	var k struct{ Public []byte }
	if err := json.Unmarshal(blob, &k); err != nil {
		t.Fatal(err)
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](k.Public)
	if err != nil {
		t.Fatal(err)
	}
	public.ObjectAttributes.UserWithAuth = true
	area, err := json.Marshal(tpm2.Marshal(public))
	if err != nil {
		t.Fatal(err)
	}
	n.signsNot(edit(t, blob, "public", string(area)), seal.CauseCredentials, "of another kind")
}

// member returns a member of a client key's file, as JSON.
func member(t *testing.T, blob []byte, name string) string {
	t.Helper()
	var all map[string]json.RawMessage
	if err := json.Unmarshal(blob, &all); err != nil {
		t.Fatal(err)
	}
	return string(all[name])
}

// edit replaces a member of a client key's file.
func edit(t *testing.T, blob []byte, name, value string) []byte {
	t.Helper()
	old := `"` + name + `":` + member(t, blob, name)
	if !bytes.Contains(blob, []byte(old)) {
		t.Fatalf("no %s in %s", old, blob)
	}
	return bytes.Replace(blob, []byte(old), []byte(`"`+name+`":`+value), 1)
}

// TestClientKeyFaults: faults of the TPM, and of an impostor in its place.
func TestClientKeyFaults(t *testing.T) {
	n := newNode(t)
	blob, public := n.newClientKey()
	signer, err := credential.ClientSigner(t.Context(), n.Device, n.Owner, blob)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := signer.Sign(nil, make([]byte, 48), crypto.SHA384); err == nil || !strings.Contains(err.Error(), "SHA-256 digests only") {
		t.Errorf("a SHA-384 digest: %v", err)
	}
	flip := tpmtest.Change(func(r []byte) []byte { r[len(r)/2] ^= 1; return r })
	for name, f := range map[string]tpmtest.Fault{
		"vanishes": {On: tpm2.TPMCCSign, Do: tpmtest.Drop}, "refuses": {On: tpm2.TPMCCLoad, Do: tpmtest.Code(tpm2.TPMRCObjectMemory)},
		"signs wrong": {On: tpm2.TPMCCSign, Do: flip}, "garbage": {On: tpm2.TPMCCSign, Do: tpmtest.Raw([]byte("garbage"))},
		"PCRs keep changing": {On: tpm2.TPMCCSign, Do: tpmtest.Code(tpm2.TPMRCPCRChanged)},
	} {
		n.Proxy.Inject(f)
		if err := n.signsNot(blob, seal.CauseUnavailable); err != nil {
			t.Logf("%s: %v", name, err)
		}
		n.Proxy.Heal()
		n.signs(blob, public)
	}
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCSign, Times: 2, Do: tpmtest.Code(tpm2.TPMRCPCRChanged)})
	n.signs(blob, public)
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCPCRRead, Do: flip})
	if _, _, err := credential.NewClientKey(t.Context(), n.Device, n.Owner, crypto.SHA256); err == nil {
		t.Error("a key was made for a PCR value that was changed on the way")
	}
	n.Proxy.Heal()
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCStartAuthSession, Do: tpmtest.Code(tpm2.TPMRCLockout)})
	n.signsNot(blob, seal.CauseLockout, "dictionary-attack lockout")
}

// FuzzClientKey: an accepted file has NewClientKey's form, and no other file says the
// same.
func FuzzClientKey(f *testing.F) {
	blob := clientKeySeed(f)
	f.Add(blob)
	f.Add([]byte(`{"form":"client-key-v1","srk":"zz"}`))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, data []byte) {
		signer, err := credential.ClientSigner(t.Context(), nil, keys.Owner{}, data)
		if err != nil {
			if seal.CauseOf(err) != seal.CauseCredentials {
				t.Errorf("%v: cause %q", err, seal.CauseOf(err))
			}
			return
		}
		if _, err := signer.Public().(*ecdsa.PublicKey).ECDH(); err != nil {
			t.Error(err)
		}
		var members map[string]any
		if err := json.Unmarshal(data, &members); err != nil || len(members) != 6 || !bytes.HasPrefix(data, []byte(`{"form":"client-key-v1","srk":"`)) {
			t.Errorf("accepted %q with %v", data, maps.Keys(members))
		}
	})
}

// clientKeySeed is a file like NewClientKey's, except for the parts that only a TPM can
// make.
func clientKeySeed(f *testing.F) []byte {
	f.Helper()
	value := bytes.Repeat([]byte{7}, 32)
	digest, err := authpolicy.Terms{authpolicy.PCR{Bank: crypto.SHA256, Values: map[int][]byte{7: value}}}.Digest()
	if err != nil {
		f.Fatal(err)
	}
	bytesOf := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	public := tpm2.Marshal(tpm2.TPMTPublic{Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, AdminWithPolicy: true, NoDA: true, SignEncrypt: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: digest},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256,
			Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})}}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{ // the curve's base point
			X: tpm2.TPM2BECCParameter{Buffer: bytesOf("6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296")},
			Y: tpm2.TPM2BECCParameter{Buffer: bytesOf("4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5")}}),
	})
	blob, err := json.Marshal(struct {
		Form    string `json:"form"`
		SRK     string `json:"srk"`
		Bank    string `json:"bank"`
		PCR7    string `json:"pcr7"`
		Public  []byte `json:"public"`
		Private []byte `json:"private"`
	}{"client-key-v1", "000b" + hex.EncodeToString(make([]byte, 32)), "sha256", hex.EncodeToString(value), public, make([]byte, 64)})
	if err != nil {
		f.Fatal(err)
	}
	blob = append(blob, '\n')
	if _, err := credential.ClientSigner(f.Context(), nil, keys.Owner{}, blob); err != nil {
		f.Fatalf("the seed is refused: %v", err)
	}
	return blob
}
