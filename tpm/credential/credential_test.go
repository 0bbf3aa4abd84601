package credential_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/credential"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// credential returns some bytes in locked memory.
func (n *node) credential(b string) *seal.Secret {
	n.Helper()
	s, err := n.Memory.Take([]byte(b))
	if err != nil {
		n.Fatal(err)
	}
	n.Cleanup(func() { s.Close() })
	return s
}

func (n *node) sealed(s *seal.Secret) (blob []byte) {
	n.Helper()
	blob, err := credential.Seal(n.Context(), n.Device, n.Owner, crypto.SHA256, s)
	if err != nil {
		n.Fatal(err)
	}
	return blob
}

func (n *node) unseal(blob []byte) (*seal.Secret, error) {
	return credential.Unseal(n.Context(), n.Device, n.Owner, n.Memory, blob)
}

// unseals demands that blob holds s.
func (n *node) unseals(blob []byte, s *seal.Secret) {
	n.Helper()
	got, err := n.unseal(blob)
	if err != nil {
		n.Errorf("Unseal: %v", err)
		return
	}
	defer got.Close()
	if !got.Equal(s) {
		n.Error("it holds another credential")
	}
}

// unsealsNot demands a refusal with the cause, a hint and these words.
func (n *node) unsealsNot(blob []byte, cause seal.Cause, words ...string) error {
	n.Helper()
	got, err := n.unseal(blob)
	if err == nil {
		got.Close()
		n.Errorf("it unseals, want %q", cause)
		return nil
	}
	n.Want(err, cause, words...)
	return err
}

// TestCredential: a sealed credential unseals, even after a reboot, with another kernel
// and in a locked-out TPM, and leaves nothing in the TPM. The file does not contain it.
func TestCredential(t *testing.T) {
	n := newNode(t)
	pin := n.credential("73616220")
	blob := n.sealed(pin)
	if len(blob) > credential.MaxFile/2 || bytes.Contains(blob, []byte("73616220")) || bytes.Contains(blob, []byte(hex.EncodeToString([]byte("73616220")))) {
		t.Errorf("the file: %s", blob)
	}
	for range 4 { // a TPM without a resource manager has room for three objects
		n.unseals(blob, pin)
	}
	if n.Left() != 0 {
		t.Error("a handle is left")
	}
	b := n.Machine.Current()
	b.Kernel, b.Firmware = "6.13.1", "edk2 2099.01"
	n.Machine.Reboot(b)
	n.unseals(blob, pin)
	if again := n.sealed(pin); bytes.Equal(blob, again) {
		t.Error("the same object was made twice")
	}
	n.Must(nodetest.LockOut)
	n.unseals(blob, pin)
}

// TestCredentialInMemory: a sealed or unsealed credential is only in its locked memory.
func TestCredentialInMemory(t *testing.T) {
	n := newNode(t)
	pin, err := n.Memory.New(24)
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Close()
	pin.With(func(b []byte) { rand.Read(b) })
	watch := sealtest.NewWatch()
	watch.Add("PIN", pin)
	blob := n.sealed(pin)
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("after Seal: %q", found)
	}
	n.unseals(blob, pin)
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("after Unseal: %q", found)
	}
}

// TestCredentialSizes: 1 to 128 bytes.
func TestCredentialSizes(t *testing.T) {
	n := newNode(t)
	for _, size := range []int{1, 2, credential.Max} {
		s := n.credential(strings.Repeat("p", size))
		n.unseals(n.sealed(s), s)
	}
	closed := n.credential("1")
	closed.Close()
	for _, s := range []*seal.Secret{closed, n.credential(strings.Repeat("p", credential.Max+1))} {
		if blob, err := credential.Seal(t.Context(), n.Device, n.Owner, crypto.SHA256, s); err == nil || !strings.Contains(err.Error(), "want 1 to 128") {
			t.Errorf("%s, %v", blob, err)
		}
	}
}

// TestCredentialBanks: each bank has its own value.
func TestCredentialBanks(t *testing.T) {
	n := newNode(t)
	pin := n.credential("73616220")
	blob, err := credential.Seal(t.Context(), n.Device, n.Owner, crypto.SHA384, pin)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(blob, []byte(`"bank":"sha384"`)) {
		t.Errorf("%s", blob)
	}
	n.unseals(blob, pin)
}

// TestCredentialIsBoundToSecureBoot: every change of PCR 7 ends the credential's use,
// until PCR 7 has its old value again.
func TestCredentialIsBoundToSecureBoot(t *testing.T) {
	n := newNode(t)
	pin := n.credential("73616220")
	blob := n.sealed(pin)
	was := n.Machine.Current()
	for name, change := range map[string]func(*simboot.Boot){
		"Secure Boot off": func(b *simboot.Boot) { b.SecureBoot = false },
		"other keys":      func(b *simboot.Boot) { b.Keys = "somebody else" },
		"dbx":             func(b *simboot.Boot) { b.Dbx = "2019-01-01" },
	} {
		b := was
		change(&b)
		n.Machine.Reboot(b)
		if err := n.unsealsNot(blob, seal.CauseBootState, "bound to PCR 7", "seal a new one with kleidi pkcs11-pin"); !errors.Is(err, authpolicy.ErrBootState) {
			t.Errorf("%s: %v", name, err)
		}
		// An attacker who talks to the TPM directly has no other way to unseal.
		n.Must(func(tp transport.TPM) error { return unsealsWithout(n, tp, blob) })
		n.unseals(n.sealed(pin), pin)
	}
	n.Machine.Reboot(was)
	n.unseals(blob, pin)
}

// unsealsWithout tries to unseal with a password, and with a session that satisfied
// nothing, and to give the object a password.
func unsealsWithout(n *node, tp transport.TPM, blob []byte) error {
	var c struct{ Public, Private []byte }
	if err := json.Unmarshal(blob, &c); err != nil {
		return err
	}
	satisfyNothing := func(transport.TPM, tpm2.TPMISHPolicy, tpm2.TPM2BNonce) error { return nil }
	return keys.WithSRK(tp, n.Owner, nil, func(srk *keys.SRK) error {
		parent := tpm2.AuthHandle{Handle: srk.Handle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)}
		object, err := tpm2.Load{ParentHandle: parent, InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](c.Public), InPrivate: tpm2.TPM2BPrivate{Buffer: c.Private}}.Execute(tp)
		if err != nil {
			return err
		}
		defer func() { _, _ = tpm2.FlushContext{FlushHandle: object.ObjectHandle}.Execute(tp) }()
		for name, auth := range map[string]tpm2.Session{"a password": tpm2.PasswordAuth(nil), "an empty session": tpm2.Policy(tpm2.TPMAlgSHA256, 16, satisfyNothing)} {
			handle := tpm2.AuthHandle{Handle: object.ObjectHandle, Name: object.Name, Auth: auth}
			if _, err := (tpm2.Unseal{ItemHandle: handle}).Execute(tp); !errors.Is(err, tpm2.TPMRCAuthUnavailable) && !errors.Is(err, tpm2.TPMRCPolicyFail) {
				n.Errorf("TPM2_Unseal with %s: %v", name, err)
			}
			_, err := tpm2.ObjectChangeAuth{ObjectHandle: handle, ParentHandle: tpm2.NamedHandle{Handle: srk.Handle, Name: srk.Name},
				NewAuth: tpm2.TPM2BAuth{Buffer: []byte("new")}}.Execute(tp)
			if err == nil {
				n.Errorf("TPM2_ObjectChangeAuth with %s succeeds", name)
			}
		}
		return nil
	})
}

// TestCredentialOfAnotherTPM: the file is useless there, and after TPM2_Clear.
func TestCredentialOfAnotherTPM(t *testing.T) {
	n, other := newNode(t), newNode(t)
	blob := n.sealed(n.credential("73616220"))
	other.unsealsNot(blob, seal.CauseOtherTPM, "sealed by another TPM: its endorsement key is sha256:", "seal a new one with kleidi pkcs11-pin")
	// The file is useless even if it names the other TPM's storage root key as its
	// parent.
	theirs := other.sealed(other.credential("1"))
	other.unsealsNot(edit(t, blob, "srk", member(t, theirs, "srk")), seal.CauseCredentials, "TPM2_Load", "kleidi pkcs11-pin")
	if err := n.Machine.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.unsealsNot(blob, seal.CauseTPMCleared, "this TPM was cleared after the credential was sealed", "kleidi pkcs11-pin")
}

// TestDamagedCredential: each member of the file, and objects of another kind.
func TestDamagedCredential(t *testing.T) {
	n := newNode(t)
	blob := n.sealed(n.credential("73616220"))
	key, _ := n.newClientKey()
	kek := n.Sealed(n.KEK())
	n.Proxy.Forget()
	zeros, err := json.Marshal(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"empty": {}, "no object": []byte("null\n"), "cut": blob[:len(blob)-3], "no newline": blob[:len(blob)-1], "trailing": append(bytes.Clone(blob), '\n'),
		"large": append(bytes.Clone(blob), bytes.Repeat([]byte(" "), credential.MaxFile)...), "unknown member": bytes.Replace(blob, []byte("{"), []byte(`{"x":1,`), 1),
		"twice": bytes.Replace(blob, []byte("{"), []byte(`{"form":"sealed-credential-v1",`), 1), "other form": edit(t, blob, "form", `"sealed-credential-v2"`),
		"a client key": key, "called one": edit(t, key, "form", `"sealed-credential-v1"`), "a slot": kek.Data,
		"no parent": edit(t, blob, "srk", `""`), "PCR 7": edit(t, blob, "pcr7", `"`+strings.Repeat("11", 32)+`"`), "all zero": edit(t, blob, "pcr7", `"`+strings.Repeat("00", 32)+`"`),
		"bank": edit(t, blob, "bank", `"sha384"`), "no bank": edit(t, blob, "bank", `"sha1"`), "public": edit(t, blob, "public", string(zeros)), "another's public": edit(t, blob, "public", member(t, key, "public")),
		"no EK": edit(t, blob, "ek", `""`), "EK": edit(t, blob, "ek", `"sha256:`+strings.Repeat("zz", 32)+`"`), "EK in upper case": edit(t, blob, "ek", `"sha256:`+strings.Repeat("AA", 32)+`"`),
	} {
		if got, err := n.unseal(b); err == nil {
			got.Close()
			t.Errorf("%s: accepted", name)
		} else {
			n.Want(err, seal.CauseCredentials, "the file of the sealed credential is damaged", "kleidi pkcs11-pin")
		}
	}
	if seen := len(n.Proxy.Traffic()); seen != 0 {
		t.Errorf("the TPM got %d commands for damaged files", seen)
	}
	n.unsealsNot(edit(t, blob, "private", string(zeros)), seal.CauseCredentials, "damaged: TPM2_Load", "kleidi pkcs11-pin")
	n.unsealsNot(edit(t, blob, "public", weakened(t, blob)), seal.CauseCredentials, "of another kind")
}

// weakened is a public area of a sealed object that a password opens.
func weakened(t *testing.T, blob []byte) string {
	t.Helper()
	var c struct{ Public []byte }
	if err := json.Unmarshal(blob, &c); err != nil {
		t.Fatal(err)
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](c.Public)
	if err != nil {
		t.Fatal(err)
	}
	public.ObjectAttributes.UserWithAuth = true
	area, err := json.Marshal(tpm2.Marshal(public))
	if err != nil {
		t.Fatal(err)
	}
	return string(area)
}

// TestCredentialFaults: faults of the TPM, and of an impostor in its place.
func TestCredentialFaults(t *testing.T) {
	n := newNode(t)
	pin := n.credential("73616220")
	blob := n.sealed(pin)
	flip := tpmtest.Change(func(r []byte) []byte { r[len(r)/2] ^= 1; return r })
	for name, f := range map[string]tpmtest.Fault{
		"vanishes": {On: tpm2.TPMCCUnseal, Do: tpmtest.Drop}, "refuses": {On: tpm2.TPMCCLoad, Do: tpmtest.Code(tpm2.TPMRCObjectMemory)},
		"another credential": {On: tpm2.TPMCCUnseal, Do: flip}, "garbage": {On: tpm2.TPMCCUnseal, Do: tpmtest.Raw([]byte("garbage"))},
		"PCRs keep changing": {On: tpm2.TPMCCUnseal, Do: tpmtest.Code(tpm2.TPMRCPCRChanged)},
	} {
		n.Proxy.Inject(f)
		if err := n.unsealsNot(blob, seal.CauseUnavailable); err != nil {
			t.Logf("%s: %v", name, err)
		}
		n.Proxy.Heal()
		n.unseals(blob, pin)
	}
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCUnseal, Times: 2, Do: nodetest.ExtendFirst})
	n.unseals(blob, pin)
	n.Proxy.Heal()
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCPCRRead, Do: flip})
	if _, err := credential.Seal(t.Context(), n.Device, n.Owner, crypto.SHA256, pin); err == nil {
		t.Error("it was sealed to a PCR value that was changed on the way")
	}
	n.Proxy.Heal()
	n.Proxy.Vanish()
	n.unsealsNot(blob, seal.CauseUnavailable, "TPM unix:")
	n.Proxy.Return()
	n.unseals(blob, pin)
}

// TestNoCredentialCrossesTheBus: the credential never crosses the bus unencrypted, nor
// in a session whose key is known. An impostor in the TPM's place, with a storage root
// key of its own, gets no session.
func TestNoCredentialCrossesTheBus(t *testing.T) {
	n, his := newNode(t), newNode(t)
	pin := n.credential("kleidi-73616220-kleidi")
	blob := n.sealed(pin)
	n.unseals(blob, pin)
	for _, part := range []string{"kleidi-7361", "6220-kleidi"} {
		if n.Proxy.Saw([]byte(part)) {
			t.Errorf("%q crossed the bus in plain", part)
		}
	}
	if n.Proxy.Count(tpm2.TPMCCCreate) == 0 || n.Proxy.Count(tpm2.TPMCCUnseal) == 0 {
		t.Error("nothing crossed the bus")
	}
	n.Proxy.Forget()
	n.unseals(n.sealed(pin), pin)
	for _, e := range n.Proxy.Traffic() {
		// An impostor knows the key of a session that is not salted.
		if salted := e.Command[10:14]; e.Code == tpm2.TPMCCStartAuthSession && bytes.Equal(salted, []byte{0x40, 0, 0, 7}) {
			t.Error("a session was started without a salt")
		}
	}
	mine, theirs := n.SRKPoint(), his.SRKPoint()
	n.Proxy.Forget()
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCCreatePrimary, Do: tpmtest.Change(func(response []byte) []byte {
		return bytes.Replace(response, mine, theirs, 1)
	})})
	n.unsealsNot(blob, seal.CauseTPMCleared)
	if n.Proxy.Count(tpm2.TPMCCStartAuthSession)+n.Proxy.Count(tpm2.TPMCCUnseal) != 0 {
		t.Error("a session with the interposer was started")
	}
	n.Proxy.Heal()
	n.unseals(blob, pin)
}

// FuzzSealedCredential: an accepted file has Seal's form, and no other file
// says the same.
func FuzzSealedCredential(f *testing.F) {
	f.Add(credentialSeed(f))
	f.Add([]byte(`{"form":"sealed-credential-v1","srk":"zz"}`))
	f.Add([]byte("null"))
	none := device.New(device.Address{}, 0)
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := credential.Unseal(t.Context(), none, keys.Owner{}, seal.Memory{}, data)
		if seal.CauseOf(err) == seal.CauseUnavailable { // the file was accepted, and there is no TPM
			var members map[string]any
			if err := json.Unmarshal(data, &members); err != nil || len(members) != 7 || !bytes.HasPrefix(data, []byte(`{"form":"sealed-credential-v1","srk":"`)) {
				t.Errorf("accepted %q", data)
			}
		} else if seal.CauseOf(err) != seal.CauseCredentials {
			t.Errorf("%v: cause %q", err, seal.CauseOf(err))
		}
	})
}

// credentialSeed is a file like Seal's, except for the parts that only a TPM
// can make.
func credentialSeed(f *testing.F) []byte {
	f.Helper()
	value := bytes.Repeat([]byte{7}, 32)
	digest, err := authpolicy.Terms{authpolicy.PCR{Bank: crypto.SHA256, Values: map[int][]byte{7: value}}}.Digest()
	if err != nil {
		f.Fatal(err)
	}
	public := tpm2.Marshal(tpm2.TPMTPublic{Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, AdminWithPolicy: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: digest},
		Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull}}),
		Unique:           tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: make([]byte, 32)})})
	blob, err := json.Marshal(struct {
		Form    string `json:"form"`
		SRK     string `json:"srk"`
		Bank    string `json:"bank"`
		PCR7    string `json:"pcr7"`
		Public  []byte `json:"public"`
		Private []byte `json:"private"`
		EK      string `json:"ek"`
	}{"sealed-credential-v1", "000b" + hex.EncodeToString(make([]byte, 32)), "sha256", hex.EncodeToString(value), public, make([]byte, 64),
		"sha256:" + hex.EncodeToString(make([]byte, 32))})
	if err != nil {
		f.Fatal(err)
	}
	blob = append(blob, '\n')
	if _, err := credential.Unseal(f.Context(), device.New(device.Address{}, 0), keys.Owner{}, seal.Memory{}, blob); seal.CauseOf(err) != seal.CauseUnavailable {
		f.Fatalf("the seed is refused: %v", err)
	}
	return blob
}
