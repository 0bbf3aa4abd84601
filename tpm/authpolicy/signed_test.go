package authpolicy_test

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// failing is a TPM that fails at one command.
type failing struct {
	transport.TPM
	at tpm2.TPMCC
}

func (f failing) Send(b []byte) ([]byte, error) {
	if tpm2.TPMCC(binary.BigEndian.Uint32(b[6:])) == f.at {
		return []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 1, 1}, nil // TPM_RC_FAILURE
	}
	return f.TPM.Send(b)
}

// TestSigned: with the signer's agreement, a session comes to the digest, which
// is the one of a trial session.
func TestSigned(t *testing.T) {
	all := signers(t)
	withCounter(t, func(tp transport.TPM, counter *nv.Counter, epoch uint64) error {
		pcr := presentPCRs(t, tp, crypto.SHA256, 4, 7)
		for kind, verifier := range all {
			for _, ref := range [][]byte{nil, ref} {
				rest := authpolicy.Terms{pcr, epochTerm(counter, epoch)}
				terms := append(rest[:2:2], authpolicy.Signed{Key: verifier.public, Ref: ref, Sign: verifier.agree(ref)})
				want, err := terms.Digest()
				if err != nil {
					return err
				}
				if got, err := digestOnTPM(tp, terms); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %x on the TPM (%v), %x computed here", kind, got, err, want)
				}
				if got, err := trial(tp, func(s tpm2.Session) error {
					if err := rest.Satisfy(tp, s); err != nil {
						return err
					}
					return signedTrial(tp, s, verifier, ref)
				}); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %x in a trial (%v), %x computed here", kind, got, err, want)
				}
			}
		}
		noneLeft(t, tp)
		return nil
	})
}

// signedTrial is TPM2_PolicySigned as it is sent in a trial session, where the
// signature may be anything.
func signedTrial(tp transport.TPM, s tpm2.Session, verifier *signer, ref []byte) error {
	r, err := tpm2.LoadExternal{InPublic: tpm2.New2B(verifier.public), Hierarchy: tpm2.TPMRHNull}.Execute(tp)
	if err != nil {
		return err
	}
	defer func() { _, _ = tpm2.FlushContext{FlushHandle: r.ObjectHandle}.Execute(tp) }()
	_, err = tpm2.PolicySigned{AuthObject: tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PolicySession: s.Handle(),
		PolicyRef: tpm2.TPM2BNonce{Buffer: ref}, Auth: verifier.sign(make([]byte, 32), nil)}.Execute(tp)
	return err
}

// TestSignedRefusals: an agreement to another session, for another reference, by
// another key or to something else is refused.
func TestSignedRefusals(t *testing.T) {
	all := signers(t)
	withCounter(t, func(tp transport.TPM, _ *nv.Counter, _ uint64) error {
		for kind, verifier := range all {
			stranger, otherKind := ecdsaSigner(t, elliptic.P256()), rsaSigner(t)
			if kind == "RSA" {
				stranger, otherKind = rsaSigner(t), ecdsaSigner(t, elliptic.P256())
			}
			var earlier tpm2.TPMTSignature // an agreement that was used before
			record := func(nonce []byte) (s tpm2.TPMTSignature, err error) {
				earlier, err = verifier.agree(ref)(nonce)
				return earlier, err
			}
			if _, err := digestOnTPM(tp, authpolicy.Terms{authpolicy.Signed{Key: verifier.public, Ref: ref, Sign: record}}); err != nil {
				t.Fatal(err)
			}
			for name, sign := range map[string]func([]byte) (tpm2.TPMTSignature, error){
				"a stale nonce":       func([]byte) (tpm2.TPMTSignature, error) { return earlier, nil },
				"another key":         stranger.agree(ref),
				"another kind of key": otherKind.agree(ref),
				"another reference":   verifier.agree([]byte("other node")),
				"no reference":        verifier.agree(nil),
				"the nonce alone":     func(nonce []byte) (tpm2.TPMTSignature, error) { return verifier.sign(hashOf(nonce), nil), nil },
				"an expiration": func(nonce []byte) (tpm2.TPMTSignature, error) {
					return verifier.sign(hashOf(nonce, []byte{0, 0, 0, 60}, ref), nil), nil
				},
				"no signature": func([]byte) (tpm2.TPMTSignature, error) { return tpm2.TPMTSignature{}, nil },
				"no signer":    nil,
			} {
				_, err := digestOnTPM(tp, authpolicy.Terms{authpolicy.Signed{Key: verifier.public, Ref: ref, Sign: sign}})
				wantOnly(t, kind+", "+name, err, authpolicy.ErrSignature)
			}
			noneLeft(t, tp)
		}
		return nil
	})
}

func hashOf(parts ...[]byte) []byte {
	h := crypto.SHA256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// TestSignedNonce: no signature is made that a TPM would accept in every session,
// or that could be taken for a signed boot state.
func TestSignedNonce(t *testing.T) {
	for n := range 70 {
		h, err := authpolicy.SignedHash(make([]byte, n), ref)
		if (err == nil) != (n == authpolicy.NonceSize) {
			t.Errorf("%d bytes: %x, %v", n, h, err)
		}
	}
}

// TestSignerFails: the signer's error is passed on.
func TestSignerFails(t *testing.T) {
	gone := errors.New("no answer")
	withCounter(t, func(tp transport.TPM, _ *nv.Counter, _ uint64) error {
		_, err := digestOnTPM(tp, authpolicy.Terms{authpolicy.Signed{Key: ecdsaSigner(t, elliptic.P256()).public,
			Sign: func([]byte) (tpm2.TPMTSignature, error) { return tpm2.TPMTSignature{}, gone }}})
		if !errors.Is(err, gone) {
			t.Error(err)
		}
		return nil
	})
}

// TestThreeSlots: with two transient objects loaded, the terms need room for only one
// more, and free it for the command that they authorize.
func TestThreeSlots(t *testing.T) {
	op, verifier := rsaSigner(t), ecdsaSigner(t, elliptic.P256())
	withCounter(t, func(tp transport.TPM, _ *nv.Counter, _ uint64) error {
		for range 2 {
			r, err := tpm2.LoadExternal{InPublic: tpm2.New2B(op.public), Hierarchy: tpm2.TPMRHNull}.Execute(tp)
			if err != nil {
				return err
			}
			defer func() { _, _ = tpm2.FlushContext{FlushHandle: r.ObjectHandle}.Execute(tp) }()
		}
		pcr := presentPCRs(t, tp, crypto.SHA256, 4, 7)
		_, err := digestOnTPM(tp, authpolicy.Terms{
			authpolicy.Authorized{Key: op.public, Ref: ref, States: []authpolicy.SignedState{op.state(pcr, ref)}}, pcr,
			authpolicy.Signed{Key: verifier.public, Sign: verifier.agree(nil)},
		})
		if err != nil {
			t.Error(err)
		}
		r, err := tpm2.LoadExternal{InPublic: tpm2.New2B(op.public), Hierarchy: tpm2.TPMRHNull}.Execute(tp)
		if err != nil {
			t.Errorf("the third slot: %v", err)
			return nil
		}
		_, err = tpm2.FlushContext{FlushHandle: r.ObjectHandle}.Execute(tp)
		return err
	})
}

// TestResetsDigestIsTheTPMs compares with a trial session, for any limit.
func TestResetsDigestIsTheTPMs(t *testing.T) {
	withCounter(t, func(tp transport.TPM, counter *nv.Counter, epoch uint64) error {
		pcr := presentPCRs(t, tp, crypto.SHA256, 7)
		seen := map[string]bool{}
		for _, atMost := range []uint32{0, 1, 255, 256, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
			terms := authpolicy.Terms{pcr, authpolicy.Resets{AtMost: atMost}, epochTerm(counter, epoch)}
			got, err := terms.Digest()
			if err != nil {
				return err
			}
			want, err := digestOnTPM(tp, terms, tpm2.Trial())
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d: %x computed here, %x on the TPM (%v)", atMost, got, want, err)
			}
			if seen[string(got)] {
				t.Errorf("%d: the digest of another limit", atMost)
			}
			seen[string(got)] = true
		}
		return nil
	})
}

// TestResets: a limit of two more boots opens in two and no more, and power failures
// count as well.
func TestResets(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	try := func(f func(transport.TPM) error) error { return m.TPM().Do(t.Context(), f) }
	var start uint32
	if err := try(func(tp transport.TPM) error {
		return keys.WithSRK(tp, keys.Owner{}, nil, func(srk *keys.SRK) (err error) {
			start, err = authpolicy.ResetCount(tp, srk.Session(tpm2.Audit()))
			return err
		})
	}); err != nil {
		t.Fatal(err)
	}
	terms := authpolicy.Terms{authpolicy.Resets{AtMost: start + 2}}
	for boot := range 5 {
		var now uint32
		err := try(func(tp transport.TPM) (err error) {
			if now, err = authpolicy.ResetCount(tp); err != nil {
				return err
			}
			_, err = digestOnTPM(tp, terms)
			return err
		})
		if int(now-start) != boot {
			t.Errorf("boot %d: resetCount went from %d to %d", boot, start, now)
		}
		if boot <= 2 && err != nil {
			t.Errorf("boot %d: %v", boot, err)
		} else if boot > 2 {
			wantOnly(t, "one boot more", err, authpolicy.ErrResets)
		}
		if boot%2 == 0 {
			m.CutPower()
		}
		m.Reboot(m.Current())
	}
	if err := m.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := try(func(tp transport.TPM) error {
		now, err := authpolicy.ResetCount(tp)
		if now != 0 {
			t.Errorf("after TPM2_Clear: %d", now)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// TestForgedResetCount: an impostor in the TPM's place can't forge a count, because the
// answer is audited.
func TestForgedResetCount(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	var plain, audited uint32
	var auditError error
	err := m.TPM().Do(t.Context(), func(tp transport.TPM) error {
		return keys.WithSRK(tp, keys.Owner{}, nil, func(srk *keys.SRK) (err error) {
			forging := forgedClock{tp}
			if plain, err = authpolicy.ResetCount(forging); err != nil {
				return err
			}
			audited, auditError = authpolicy.ResetCount(forging, srk.Session(tpm2.Audit()))
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	if plain < 1<<31 {
		t.Fatalf("nothing was forged: %d", plain)
	}
	if auditError == nil {
		t.Errorf("a forged answer is accepted: %d", audited)
	}
}

// forgedClock sets the highest bit of resetCount in each answer to TPM2_ReadClock.
type forgedClock struct{ transport.TPM }

func (f forgedClock) Send(b []byte) ([]byte, error) {
	r, err := f.TPM.Send(b)
	if err != nil || tpm2.TPMCC(binary.BigEndian.Uint32(b[6:])) != tpm2.TPMCCReadClock {
		return r, err
	}
	at := 10 + 16
	if binary.BigEndian.Uint16(r) == uint16(tpm2.TPMSTSessions) {
		at += 4 // parameterSize
	}
	r[at] |= 0x80
	return r, nil
}

// TestRawCommandAnswers: a malformed answer is an error and never means yes.
func TestRawCommandAnswers(t *testing.T) {
	for name, answer := range map[string][]byte{
		"none": nil, "short": {0x80, 1, 0, 0, 0, 10, 0, 0, 0}, "long": {0x80, 1, 0, 0, 0, 11, 0, 0, 0, 0, 0},
		"another size": {0x80, 1, 0, 0, 0, 12, 0, 0, 0, 0}, "a failure": {0x80, 1, 0, 0, 0, 10, 0, 0, 1, 1},
	} {
		err := authpolicy.Terms{authpolicy.Resets{}}.Satisfy(saying(answer), noSession{})
		if wantOnly(t, name, err, nil); err == nil {
			t.Errorf("%s is a yes", name)
		}
	}
}

type saying []byte

func (s saying) Send([]byte) ([]byte, error) { return s, nil }
