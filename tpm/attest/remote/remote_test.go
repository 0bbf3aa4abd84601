package remote

import (
	"bytes"
	"encoding/hex"
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestSignatureSatisfiesTheTPM: with a signature the session's digest is the one
// that is computed without a TPM; for another session, another reference
// or by another key, the TPM refuses it.
func TestSignatureSatisfiesTheTPM(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	for name, key := range map[string]*Key{"ECDSA": ecdsaKey(t), "RSA": rsaKey(t, 2048)} {
		r.use(key)
		ref := PolicyRef(cluster, "alpha")
		var old tpm2.TPMTSignature
		err := r.session(func(tp transport.TPM, srk *keys.SRK, s tpm2.Session) (err error) {
			if old, err = r.attester.Sign(t.Context(), tp, srk, s.NonceTPM().Buffer); err != nil {
				return err
			}
			for what, attempt := range map[string]func() error{
				"another node's reference":    func() error { return policySigned(tp, key.Public(), s, PolicyRef(cluster, "beta"), old) },
				"another cluster's reference": func() error { return policySigned(tp, key.Public(), s, PolicyRef([16]byte{9}, "alpha"), old) },
				"no reference":                func() error { return policySigned(tp, key.Public(), s, nil, old) },
				"another key":                 func() error { return policySigned(tp, rsaKey(t, 2048).Public(), s, ref, old) },
			} {
				if attempt() == nil {
					t.Errorf("%s: %s: the TPM takes the signature", name, what)
				}
			}
			if err := policySigned(tp, key.Public(), s, ref, old); err != nil {
				return err
			}
			got, err := tpm2.PolicyGetDigest{PolicySession: s.Handle()}.Execute(tp)
			if err != nil {
				return err
			}
			if want := signedDigest(t, key, ref); !bytes.Equal(got.PolicyDigest.Buffer, want) {
				t.Errorf("%s: digest %x, want %x", name, got.PolicyDigest.Buffer, want)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		err = r.session(func(tp transport.TPM, _ *keys.SRK, s tpm2.Session) error {
			return policySigned(tp, key.Public(), s, ref, old)
		})
		if !errors.Is(err, tpm2.TPMRCSignature) {
			t.Errorf("%s: in another session: %v", name, err)
		}
	}
}

func signedDigest(t *testing.T, key *Key, ref []byte) []byte {
	t.Helper()
	public, err := authpolicy.PublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	digest, err := authpolicy.Terms{authpolicy.Signed{Key: public, Ref: ref}}.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

// TestBoots: every way to boot is accepted, with and without measurements by user space.
func TestBoots(t *testing.T) {
	phased := simboot.Baseline(simboot.UKI)
	phased.Phases = simboot.AllPhases
	for _, b := range []simboot.Boot{simboot.Baseline(simboot.GRUB), simboot.Baseline(simboot.EFIStub), phased} {
		r := newRig(t, b)
		r.verifier.Nodes["alpha"] = Registration{EK: ekOf(t, r.machine), BootPolicy: policyOf(t, r.machine, 0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 14)}
		r.accepted(string(b.Loader))
		if r.wire.last == nil || len(r.wire.last.Result.PCRs) != 11 {
			t.Errorf("%s: %+v", b.Loader, r.wire.last)
		}
		if b.Phases != "" {
			r.attester.Logs = attest.Logs{Firmware: r.machine.EventLog(), Userspace: filepath.Join(t.TempDir(), "none")}.Explaining
			r.accepted("with a systemd that measured its phases and logged none")
		}
	}
}

// TestThreeSlots: no handle stays in the TPM, and room for three is enough, with and
// without a persistent endorsement key, and after failures.
func TestThreeSlots(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	for _, persistent := range []bool{false, true} {
		if persistent {
			persistEK(t, r)
		}
		err := r.session(func(tp transport.TPM, srk *keys.SRK, s tpm2.Session) error {
			for range 4 {
				*r.wire = wire{verifier: r.verifier}
				if _, err := r.attester.Sign(t.Context(), tp, srk, s.NonceTPM().Buffer); err != nil {
					t.Errorf("persistent: %v: %v", persistent, err)
				}
				r.wire.challenge = func(c *Challenge) { c.Credential[0] ^= 1 }
				if _, err := r.attester.Sign(t.Context(), tp, srk, s.NonceTPM().Buffer); err == nil {
					t.Error("a damaged credential is accepted")
				}
			}
			for first, want := range map[uint32]int{0x80000000: 1, 0x02000000: 2} { // the storage root key; the policy session and the shared session
				if n := handles(t, tp, first); n != want {
					t.Errorf("persistent: %v: %d handles from %#x on, want %d", persistent, n, first, want)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func handles(t *testing.T, tp transport.TPM, first uint32) int {
	t.Helper()
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(tp)
	if err != nil {
		t.Fatal(err)
	}
	h, err := r.CapabilityData.Data.Handles()
	if err != nil {
		t.Fatal(err)
	}
	return len(h.Handle)
}

func persistEK(t *testing.T, r *rig) {
	t.Helper()
	err := r.machine.TPM().Do(t.Context(), func(tp transport.TPM) error {
		ek, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(tpm2.RSAEKTemplate)}.Execute(tp)
		if err != nil {
			return err
		}
		defer func() { _, _ = tpm2.FlushContext{FlushHandle: ek.ObjectHandle}.Execute(tp) }()
		_, err = tpm2.EvictControl{Auth: tpm2.TPMRHOwner, ObjectHandle: &tpm2.NamedHandle{Handle: ek.ObjectHandle, Name: ek.Name}, PersistentHandle: 0x81010001}.Execute(tp)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestTranscript: each field counts, and no two lists of fields are the same.
func TestTranscript(t *testing.T) {
	base := exchange.Transcript{Cluster: cluster, Node: "ab", Nonce: []byte("cd"), Exporter: []byte("ef"), Context: []byte("gh"), EK: []byte("ij"), AK: []byte("kl"), SRK: []byte("mn")}
	seen := map[string]string{}
	for name, change := range map[string]func(*exchange.Transcript){
		"none": func(*exchange.Transcript) {}, "cluster": func(x *exchange.Transcript) { x.Cluster[0]++ }, "node": func(x *exchange.Transcript) { x.Node = "b" },
		"nonce": func(x *exchange.Transcript) { x.Nonce = nil }, "exporter": func(x *exchange.Transcript) { x.Exporter = nil }, "nonceTPM": func(x *exchange.Transcript) { x.Context = nil },
		"EK": func(x *exchange.Transcript) { x.EK = nil }, "AK": func(x *exchange.Transcript) { x.AK = nil }, "SRK": func(x *exchange.Transcript) { x.SRK = nil },
		"moved":   func(x *exchange.Transcript) { x.Node, x.Nonce = "abc", []byte("d") },
		"swapped": func(x *exchange.Transcript) { x.AK, x.SRK = x.SRK, x.AK },
	} {
		c := base
		change(&c)
		d := string(purpose.Digest(&c))
		if other, ok := seen[d]; ok || len(d) != 32 {
			t.Errorf("%s and %s have the same digest", name, other)
		}
		seen[d] = name
	}
}

const (
	vectorPolicyRef     = "a4b3ff1fa4418b9495257b57eb87e48d16bea6b25b5bd8f894bc92d5952fda43"
	vectorTranscript    = "081ce72277636ea8b80785f60fc2e702d2932c0f04e860fec3630bd5c081d5cf"
	vectorProof         = "fefb24c74b26fdd3ac4a95195de35709f3d50f204be24220ddac8843a1943b6d"
	vectorAuthorization = "5440a15e8bffae6fc7cbec536032f110bafc1169dfebf558985b5bc3a20e24f4"
)

// TestVectors: the inputs of a slot's authorization policy, and the values that both
// sides compute, never change within a version.
func TestVectors(t *testing.T) {
	ref := PolicyRef(cluster, "alpha")
	hash, err := authpolicy.SignedHash(make([]byte, 16), ref)
	if err != nil {
		t.Fatal(err)
	}
	tr := exchange.Transcript{Cluster: cluster, Node: "alpha", Nonce: []byte{1}, Exporter: []byte{2}, Context: []byte{3}, EK: []byte{4}, AK: []byte{5}, SRK: []byte{6}}
	for name, c := range map[string]struct {
		got  []byte
		want string
	}{
		"policyRef":     {ref, vectorPolicyRef},
		"transcript":    {purpose.Digest(&tr), vectorTranscript},
		"proof":         {purpose.Answer([]byte{7}, purpose.Digest(&tr)), vectorProof},
		"authorization": {hash, vectorAuthorization},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}
