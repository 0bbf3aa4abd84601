package authpolicy_test

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

var ref = []byte("cluster and node")

func presentPCRs(t testing.TB, tp transport.TPM, bank crypto.Hash, pcrs ...int) authpolicy.PCR {
	t.Helper()
	now, err := keys.ReadPCRs(tp, bank, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	return authpolicy.PCR{Bank: bank, Values: now}
}

// trial returns the digest of policy commands in a trial session.
func trial(tp transport.TPM, f func(tpm2.Session) error) ([]byte, error) {
	s, done, err := tpm2.PolicySession(tp, tpm2.TPMAlgSHA256, authpolicy.NonceSize, tpm2.Trial())
	if err != nil {
		return nil, err
	}
	defer func() { _ = done() }()
	if err := f(s); err != nil {
		return nil, err
	}
	r, err := tpm2.PolicyGetDigest{PolicySession: s.Handle()}.Execute(tp)
	if err != nil {
		return nil, err
	}
	return r.PolicyDigest.Buffer, nil
}

// TestAuthorizedDigestIsTheTPMs: the digest computed here is the TPM's, even for keys
// that this TPM can't load, since a trial session needs no more than a Name.
func TestAuthorizedDigestIsTheTPMs(t *testing.T) {
	seen := map[string]bool{}
	withCounter(t, func(tp transport.TPM, counter *nv.Counter, epoch uint64) error {
		for file := range goldenNames {
			public, err := authpolicy.PublicKey(goldenKey(t, file))
			if err != nil {
				return err
			}
			name, err := authpolicy.Name(public)
			if err != nil {
				return err
			}
			for _, ref := range [][]byte{nil, ref, make([]byte, authpolicy.MaxRef)} {
				rest := authpolicy.Terms{authpolicy.PCR{Bank: crypto.SHA256, Values: values(crypto.SHA256, 7)}, epochTerm(counter, epoch)}
				want, err := trial(tp, func(s tpm2.Session) error {
					if _, err := (tpm2.PolicyAuthorize{PolicySession: s.Handle(), PolicyRef: tpm2.TPM2BDigest{Buffer: ref},
						KeySign: tpm2.TPM2BName{Buffer: name}, CheckTicket: tpm2.TPMTTKVerified{Tag: tpm2.TPMSTVerified, Hierarchy: tpm2.TPMRHOwner}}).Execute(tp); err != nil {
						return err
					}
					return rest.Satisfy(tp, s)
				})
				if err != nil {
					t.Errorf("%s: %v", file, err)
					continue
				}
				got, err := append(authpolicy.Terms{authpolicy.Authorized{Key: public, Ref: ref}}, rest...).Digest()
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %x computed here (%v), %x on the TPM", file, got, err, want)
				}
				if seen[string(got)] {
					t.Errorf("%s, ref %x: the digest of another key or reference", file, ref)
				}
				seen[string(got)] = true
			}
		}
		return nil
	})
}

// TestAuthorized: the state that is signed for the present PCR values is found
// among others, whatever they are, and the session comes to the digest.
func TestAuthorized(t *testing.T) {
	all := signers(t)
	stranger := ecdsaSigner(t, elliptic.P256())
	withCounter(t, func(tp transport.TPM, counter *nv.Counter, epoch uint64) error {
		for kind, op := range all {
			for bank := range authpolicy.Banks {
				now := presentPCRs(t, tp, bank, 4, 7, 9)
				firmware := presentPCRs(t, tp, crypto.SHA256, 7)
				good := op.state(now, ref)
				old := op.state(authpolicy.PCR{Bank: bank, Values: values(bank, 4, 7, 9)}, ref)
				otherBank := op.state(authpolicy.PCR{Bank: crypto.SHA256 + crypto.SHA384 - bank, Values: values(crypto.SHA256+crypto.SHA384-bank, 4, 7, 9)}, ref)
				otherSet := op.state(authpolicy.PCR{Bank: bank, Values: values(bank, 4, 11)}, ref)
				forged := stranger.state(now, ref)
				for name, states := range map[string][]authpolicy.SignedState{
					"alone": {good}, "after an old one": {old, good}, "before another set": {good, otherSet},
					"after another set": {otherSet, old, good}, "after a forged one": {forged, good},
					"after another bank": {otherBank, good},
				} {
					terms := authpolicy.Terms{authpolicy.Authorized{Key: op.public, Ref: ref, States: states}, firmware, epochTerm(counter, epoch)}
					got, err := digestOnTPM(tp, terms)
					if err != nil {
						t.Errorf("%s, %v, %s: %v", kind, bank, name, err)
						continue
					}
					if want, err := terms.Digest(); err != nil || !bytes.Equal(got, want) {
						t.Errorf("%s, %v, %s: %x on the TPM, %x computed here (%v)", kind, bank, name, got, want, err)
					}
				}
			}
		}
		return nil
	})
}

// TestAuthorizedRefusals: each way in which a state is not signed for these PCR
// values, by this key, for this reference, has its error; no key stays loaded.
func TestAuthorizedRefusals(t *testing.T) {
	all := signers(t)
	withCounter(t, func(tp transport.TPM, counter *nv.Counter, epoch uint64) error {
		for kind, op := range all {
			now := presentPCRs(t, tp, crypto.SHA256, 4, 7)
			other := authpolicy.PCR{Bank: crypto.SHA256, Values: values(crypto.SHA256, 4, 7)}
			good, old := op.state(now, ref), op.state(other, ref)
			moved := old // a signature over other PCR values, said to be over these
			moved.Digest = good.Digest
			stranger, otherKind := ecdsaSigner(t, elliptic.P256()), rsaSigner(t)
			if kind == "RSA" {
				stranger, otherKind = rsaSigner(t), ecdsaSigner(t, elliptic.P256())
			}
			raw := op.state(now, ref) // signed as a message of its own, not as an approval
			raw.Signature = op.sign(good.Digest, nil)
			for name, c := range map[string]struct {
				states []authpolicy.SignedState
				want   error
			}{
				"no states":              {nil, authpolicy.ErrNoSignedState},
				"other PCR values":       {[]authpolicy.SignedState{old}, authpolicy.ErrNoSignedState},
				"other PCRs":             {[]authpolicy.SignedState{op.state(authpolicy.PCR{Bank: crypto.SHA384, Values: values(crypto.SHA384, 4)}, ref)}, authpolicy.ErrNoSignedState},
				"moved signature":        {[]authpolicy.SignedState{moved}, authpolicy.ErrSignature},
				"another key":            {[]authpolicy.SignedState{stranger.state(now, ref)}, authpolicy.ErrSignature},
				"another kind of key":    {[]authpolicy.SignedState{otherKind.state(now, ref)}, authpolicy.ErrSignature},
				"another reference":      {[]authpolicy.SignedState{op.state(now, []byte("cluster and other node"))}, authpolicy.ErrSignature},
				"no reference":           {[]authpolicy.SignedState{op.state(now, nil)}, authpolicy.ErrSignature},
				"another hash":           {[]authpolicy.SignedState{raw}, authpolicy.ErrSignature},
				"two that do not verify": {[]authpolicy.SignedState{moved, stranger.state(now, ref)}, authpolicy.ErrSignature},
			} {
				terms := authpolicy.Terms{authpolicy.Authorized{Key: op.public, Ref: ref, States: c.states}, now, epochTerm(counter, epoch)}
				_, err := digestOnTPM(tp, terms)
				wantOnly(t, kind+", "+name, err, c.want)
			}
			// Signed, but its epoch has passed.
			_, err := digestOnTPM(tp, authpolicy.Terms{authpolicy.Authorized{Key: op.public, Ref: ref, States: []authpolicy.SignedState{good}}, now, epochTerm(counter, epoch-1)})
			wantOnly(t, kind+", an earlier epoch", err, authpolicy.ErrEpoch)
			// Signed, but a literal term differs.
			_, err = digestOnTPM(tp, authpolicy.Terms{authpolicy.Authorized{Key: op.public, Ref: ref, States: []authpolicy.SignedState{good}}, other})
			wantOnly(t, kind+", other literal PCRs", err, authpolicy.ErrBootState)
			noneLeft(t, tp)
		}
		return nil
	})
}

// wantOnly demands that err is one sentinel and no other.
func wantOnly(t testing.TB, name string, err, want error) {
	t.Helper()
	for _, sentinel := range []error{authpolicy.ErrBootState, authpolicy.ErrEpoch, authpolicy.ErrCounter, authpolicy.ErrNoSignedState,
		authpolicy.ErrSignature, authpolicy.ErrResets, authpolicy.ErrKey} {
		if errors.Is(err, sentinel) != (sentinel == want) {
			t.Errorf("%s: %v, want %v", name, err, want)
			return
		}
	}
}

// noneLeft fails if the TPM holds a transient object.
func noneLeft(t testing.TB, tp transport.TPM) {
	t.Helper()
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: 0x80000000, PropertyCount: 8}.Execute(tp)
	if err != nil {
		t.Fatal(err)
	}
	handles, err := r.CapabilityData.Data.Handles()
	if err != nil || len(handles.Handle) != 0 {
		t.Errorf("the TPM holds %v, %v", handles, err)
	}
}

// TestAuthorizedIsFirst: anywhere else, Authorized would undo the terms before it.
func TestAuthorizedIsFirst(t *testing.T) {
	op := ecdsaSigner(t, elliptic.P256())
	a := authpolicy.Authorized{Key: op.public}
	pcr := authpolicy.PCR{Bank: crypto.SHA256, Values: values(crypto.SHA256, 7)}
	for _, terms := range []authpolicy.Terms{{pcr, a}, {a, a}, {pcr, pcr, a}, {authpolicy.Resets{}, a, pcr}} {
		if d, err := terms.Digest(); err == nil {
			t.Errorf("%T: digest %x", terms, d)
		}
		if terms.Satisfy(nil, nil) == nil { // nil: it is refused before the TPM is asked
			t.Errorf("%T: satisfied", terms)
		}
	}
}

func TestSignedStateCheck(t *testing.T) {
	good := ecdsaSigner(t, elliptic.P256()).state(authpolicy.PCR{Bank: crypto.SHA256, Values: values(crypto.SHA256, 4, 7, 11)}, nil)
	for name, change := range map[string]func(*authpolicy.SignedState){
		"no bank":      func(s *authpolicy.SignedState) { s.Bank = 0 },
		"SHA-1":        func(s *authpolicy.SignedState) { s.Bank = crypto.SHA1 },
		"no PCRs":      func(s *authpolicy.SignedState) { s.PCRs = nil },
		"PCR -1":       func(s *authpolicy.SignedState) { s.PCRs = []int{-1, 7} },
		"PCR 24":       func(s *authpolicy.SignedState) { s.PCRs = []int{7, 24} },
		"PCR 16":       func(s *authpolicy.SignedState) { s.PCRs = []int{7, 16} },
		"PCR 23":       func(s *authpolicy.SignedState) { s.PCRs = []int{7, 23} },
		"twice":        func(s *authpolicy.SignedState) { s.PCRs = []int{7, 7} },
		"order":        func(s *authpolicy.SignedState) { s.PCRs = []int{7, 4} },
		"short digest": func(s *authpolicy.SignedState) { s.Digest = make([]byte, 31) },
		"long digest":  func(s *authpolicy.SignedState) { s.Digest = make([]byte, 48) },
		"no signature": func(s *authpolicy.SignedState) { s.Signature = tpm2.TPMTSignature{} },
		"HMAC":         func(s *authpolicy.SignedState) { s.Signature.SigAlg = tpm2.TPMAlgHMAC },
	} {
		bad := good
		bad.PCRs = slices.Clone(good.PCRs)
		change(&bad)
		if bad.Check() == nil {
			t.Errorf("%s is accepted", name)
		}
		a := authpolicy.Authorized{Key: ecdsaSigner(t, elliptic.P256()).public, States: []authpolicy.SignedState{good, bad}}
		err := authpolicy.Terms{a}.Satisfy(nil, noSession{}) // nil: it is refused before the TPM is asked
		wantOnly(t, name, err, nil)
		if err == nil {
			t.Errorf("%s: satisfied", name)
		}
	}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
}

// noSession is a session that must not be used.
type noSession struct{ tpm2.Session }

func (noSession) Handle() tpm2.TPMHandle { return 0 }

// TestLongReference: a reference that no TPM accepts is refused everywhere.
func TestLongReference(t *testing.T) {
	long := make([]byte, authpolicy.MaxRef+1)
	public := ecdsaSigner(t, elliptic.P256()).public
	if _, err := authpolicy.AuthorizedHash(make([]byte, 32), long); err == nil {
		t.Error("AuthorizedHash takes it")
	}
	if _, err := authpolicy.SignedHash(make([]byte, authpolicy.NonceSize), long); err == nil {
		t.Error("SignedHash takes it")
	}
	for _, term := range []authpolicy.Term{authpolicy.Authorized{Key: public, Ref: long}, authpolicy.Signed{Key: public, Ref: long}} {
		if _, err := (authpolicy.Terms{term}).Digest(); err == nil {
			t.Errorf("%T takes it", term)
		}
		if (authpolicy.Terms{term}).Satisfy(nil, noSession{}) == nil {
			t.Errorf("%T is satisfied", term)
		}
	}
	if _, err := authpolicy.AuthorizedHash(make([]byte, 31), nil); err == nil {
		t.Error("AuthorizedHash takes a short digest")
	}
}

// TestApprovedDigest: the digest is that of TPM2_PolicyPCR alone. PCR 11 alone is
// accepted, but no PCR that can be reset or that nothing was measured into.
func TestApprovedDigest(t *testing.T) {
	withCounter(t, func(tp transport.TPM, _ *nv.Counter, _ uint64) error {
		for bank := range authpolicy.Banks {
			for _, set := range [][]int{{11}, {4, 7}, {8, 9, 14}} {
				pcr := authpolicy.PCR{Bank: bank, Values: values(bank, set...)}
				h := crypto.SHA256.New()
				for _, i := range set {
					h.Write(pcr.Values[i])
				}
				want, err := trial(tp, func(s tpm2.Session) error {
					_, err := tpm2.PolicyPCR{PolicySession: s.Handle(), PcrDigest: tpm2.TPM2BDigest{Buffer: h.Sum(nil)}, Pcrs: authpolicy.Selection(bank, set)}.Execute(tp)
					return err
				})
				if got, gotErr := authpolicy.ApprovedDigest(pcr); gotErr != nil || err != nil || !bytes.Equal(got, want) {
					t.Errorf("%v %v: %x (%v), %x on the TPM (%v)", bank, set, got, gotErr, want, err)
				}
			}
		}
		return nil
	})
	zero := authpolicy.PCR{Bank: crypto.SHA256, Values: map[int][]byte{4: make([]byte, 32)}}
	for _, pcr := range []authpolicy.PCR{{}, zero, {Bank: crypto.SHA256, Values: values(crypto.SHA256, 4, 16)}} {
		if d, err := authpolicy.ApprovedDigest(pcr); err == nil {
			t.Errorf("%v: %x", pcr, d)
		}
	}
}
