package authpolicy_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// values are PCR values that no machine has.
func values(bank crypto.Hash, pcrs ...int) map[int][]byte {
	m := map[int][]byte{}
	for _, i := range pcrs {
		m[i] = bytes.Repeat([]byte{byte(i + 1)}, bank.Size())
	}
	return m
}

// withCounter runs f on a booted machine that has an epoch counter.
func withCounter(t *testing.T, f func(t transport.TPM, counter *nv.Counter, epoch uint64) error) {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.GRUB))
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	err = m.TPM().Do(t.Context(), func(tp transport.TPM) error {
		var epoch uint64
		err := keys.WithSRK(tp, keys.Owner{}, nil, func(srk *keys.SRK) (err error) {
			epoch, err = counter.Ensure(tp, srk)
			return err
		})
		if err != nil {
			return err
		}
		return f(tp, counter, epoch)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func epochTerm(counter *nv.Counter, atMost uint64) authpolicy.Epoch {
	return authpolicy.Epoch{Index: counter.Index(), Name: counter.Name(), AtMost: atMost}
}

// digestOnTPM returns the digest that the TPM computes for the terms.
func digestOnTPM(t transport.TPM, terms authpolicy.Terms, opts ...tpm2.AuthOption) ([]byte, error) {
	s, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, 16, opts...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = done() }()
	if err := terms.Satisfy(t, s); err != nil {
		return nil, err
	}
	r, err := tpm2.PolicyGetDigest{PolicySession: s.Handle()}.Execute(t)
	if err != nil {
		return nil, err
	}
	return r.PolicyDigest.Buffer, nil
}

// sets are PCRs to seal to.
var sets = [][]int{{4}, {7}, {4, 7, 11}, {4, 7, 9, 11}, {4, 7, 8, 9, 14}, {0, 1, 2, 3, 4, 5, 6, 7}, {0, 4, 10, 12, 13, 15}}

// TestDigestIsTheTPMs: the digest computed here without a TPM is that of a trial
// session, for values that the TPM need not have.
func TestDigestIsTheTPMs(t *testing.T) {
	seen := map[string]string{}
	withCounter(t, func(tp transport.TPM, counter *nv.Counter, epoch uint64) error {
		for bank := range authpolicy.Banks {
			for _, set := range sets {
				pcr := authpolicy.PCR{Bank: bank, Values: values(bank, set...)}
				for name, terms := range map[string]authpolicy.Terms{
					"PCRs": {pcr}, "PCRs, epoch": {pcr, epochTerm(counter, epoch)}, "epoch, PCRs": {epochTerm(counter, epoch), pcr},
					"PCRs, next epoch": {pcr, epochTerm(counter, epoch+1)}, "PCRs, any epoch": {pcr, epochTerm(counter, 1<<64-1)},
				} {
					name = fmt.Sprintf("%v %v %s", bank, set, name)
					want, err := digestOnTPM(tp, terms, tpm2.Trial())
					if err != nil {
						t.Errorf("%s: %v", name, err)
						continue
					}
					got, err := terms.Digest()
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("%s: %x computed here (%v), %x on the TPM", name, got, err, want)
					}
					if other, ok := seen[string(got)]; ok {
						t.Errorf("%s and %s have the same digest", name, other)
					}
					seen[string(got)] = name
				}
			}
		}
		return nil
	})
}

// TestSatisfy: with the values that the TPM has, a real session comes to the
// same digest, in both banks.
func TestSatisfy(t *testing.T) {
	withCounter(t, func(tp transport.TPM, counter *nv.Counter, epoch uint64) error {
		for bank := range authpolicy.Banks {
			now, err := keys.ReadPCRs(tp, bank, []int{4, 7, 8, 9, 14})
			if err != nil {
				return err
			}
			for _, atMost := range []uint64{epoch, epoch + 1} {
				terms := authpolicy.Terms{authpolicy.PCR{Bank: bank, Values: now}, epochTerm(counter, atMost)}
				got, err := digestOnTPM(tp, terms)
				if err != nil {
					t.Errorf("%v: %v", bank, err)
					continue
				}
				if want, err := terms.Digest(); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%v: %x on the TPM, %x computed here (%v)", bank, got, want, err)
				}
			}
		}
		return nil
	})
}

// TestNoTerms: an authorization policy of no terms is the TPM's initial digest.
func TestNoTerms(t *testing.T) {
	d, err := authpolicy.Terms{}.Digest()
	if err != nil || !bytes.Equal(d, make([]byte, sha256.Size)) {
		t.Errorf("%x, %v", d, err)
	}
}

// TestSatisfyRefusals: each term that does not hold has its own error, and the
// terms after it are not tried.
func TestSatisfyRefusals(t *testing.T) {
	withCounter(t, func(tp transport.TPM, counter *nv.Counter, epoch uint64) error {
		now, err := keys.ReadPCRs(tp, crypto.SHA256, []int{4, 7})
		if err != nil {
			return err
		}
		good := authpolicy.PCR{Bank: crypto.SHA256, Values: now}
		bad := authpolicy.PCR{Bank: crypto.SHA256, Values: values(crypto.SHA256, 4, 7)}
		otherBank := authpolicy.PCR{Bank: crypto.SHA384, Values: values(crypto.SHA384, 4, 7)}
		none := authpolicy.Epoch{Index: counter.Index() + 1, Name: counter.Name(), AtMost: epoch}
		for name, c := range map[string]struct {
			terms authpolicy.Terms
			want  error
		}{
			"other PCRs":               {authpolicy.Terms{bad, epochTerm(counter, epoch)}, authpolicy.ErrBootState},
			"other PCRs, SHA-384":      {authpolicy.Terms{otherBank}, authpolicy.ErrBootState},
			"epoch passed":             {authpolicy.Terms{good, epochTerm(counter, epoch-1)}, authpolicy.ErrEpoch},
			"epoch zero":               {authpolicy.Terms{good, epochTerm(counter, 0)}, authpolicy.ErrEpoch},
			"no counter":               {authpolicy.Terms{good, none}, authpolicy.ErrCounter},
			"other PCRs, epoch passed": {authpolicy.Terms{bad, epochTerm(counter, 0)}, authpolicy.ErrBootState},
			"epoch passed, other PCRs": {authpolicy.Terms{epochTerm(counter, 0), bad}, authpolicy.ErrEpoch},
		} {
			_, err := digestOnTPM(tp, c.terms)
			for _, sentinel := range []error{authpolicy.ErrBootState, authpolicy.ErrEpoch, authpolicy.ErrCounter} {
				if errors.Is(err, sentinel) != (sentinel == c.want) {
					t.Errorf("%s: %v, want %v", name, err, c.want)
				}
			}
		}
		return nil
	})
}

// TestSatisfyWithoutAWrittenCounter: a counter that was defined and never
// incremented has no value to compare.
func TestSatisfyWithoutAWrittenCounter(t *testing.T) {
	withCounter(t, func(tp transport.TPM, counter *nv.Counter, _ uint64) error {
		owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: tpm2.PasswordAuth(nil)}
		index := tpm2.TPMHandle(counter.Index() + 1)
		public := tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTCounter}}
		if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(public)}).Execute(tp); err != nil {
			return err
		}
		name, err := tpm2.NVName(&public)
		if err != nil {
			return err
		}
		_, err = digestOnTPM(tp, authpolicy.Terms{authpolicy.Epoch{Index: uint32(index), Name: name.Buffer, AtMost: 1}})
		if !errors.Is(err, authpolicy.ErrCounter) {
			t.Errorf("%v, want ErrCounter", err)
		}
		return nil
	})
}

// TestCheck: terms that protect nothing are neither sealed to nor satisfied.
func TestCheck(t *testing.T) {
	const sha256, sha384 = crypto.SHA256, crypto.SHA384
	zeroed := values(sha256, 4, 7)
	zeroed[7] = make([]byte, 32)
	short, long, none := values(sha256, 4, 7), values(sha256, 4, 7), values(sha256, 4, 7)
	short[7], long[7], none[7] = short[7][:31], append(long[7], 1), nil
	for name, c := range map[string]struct {
		pcr  authpolicy.PCR
		says string // "" means that it is accepted
	}{
		"empty":               {authpolicy.PCR{Bank: sha256}, "no PCRs"},
		"empty, not nil":      {authpolicy.PCR{Bank: sha256, Values: map[int][]byte{}}, "no PCRs"},
		"no bank":             {authpolicy.PCR{Values: values(sha256, 7)}, "bank"},
		"SHA-1":               {authpolicy.PCR{Bank: crypto.SHA1, Values: values(crypto.SHA1, 4, 7)}, "want SHA-256 or SHA-384"},
		"SHA-512":             {authpolicy.PCR{Bank: crypto.SHA512, Values: values(crypto.SHA512, 4, 7)}, "want SHA-256 or SHA-384"},
		"all zero":            {authpolicy.PCR{Bank: sha256, Values: zeroed}, "PCR 7 is all zero"},
		"short":               {authpolicy.PCR{Bank: sha256, Values: short}, "31 bytes, want 32"},
		"long":                {authpolicy.PCR{Bank: sha256, Values: long}, "33 bytes, want 32"},
		"no value":            {authpolicy.PCR{Bank: sha256, Values: none}, "0 bytes, want 32"},
		"other bank's values": {authpolicy.PCR{Bank: sha384, Values: values(sha256, 4, 7)}, "32 bytes, want 48"},
		"PCR -1":              {authpolicy.PCR{Bank: sha256, Values: values(sha256, -1, 7)}, "does not exist"},
		"PCR 24":              {authpolicy.PCR{Bank: sha256, Values: values(sha256, 7, 24)}, "does not exist"},
		"PCR 11 alone":        {authpolicy.PCR{Bank: sha256, Values: values(sha256, 11)}, "PCR 11 alone"},
		"PCR 11 alone, 384":   {authpolicy.PCR{Bank: sha384, Values: values(sha384, 11)}, "PCR 11 alone"},
		"8, 9 and 14 alone":   {authpolicy.PCR{Bank: sha256, Values: values(sha256, 14, 8, 9)}, "PCR 8, 9, 14 alone"},
		"PCR 0 and 11":        {authpolicy.PCR{Bank: sha256, Values: values(sha256, 0, 11)}, "PCR 0, 11 alone"},
		"firmware's, no 4, 7": {authpolicy.PCR{Bank: sha256, Values: values(sha256, 0, 1, 2, 3, 5, 6, 9)}, "PCR 0, 1, 2, 3, 5, 6, 9 alone"},
		"PCR 11 and another":  {authpolicy.PCR{Bank: sha256, Values: values(sha256, 4, 11)}, ""},
		"PCR 7 alone":         {authpolicy.PCR{Bank: sha384, Values: values(sha384, 7)}, ""},
	} {
		err := c.pcr.Check()
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
		if _, derr := (authpolicy.Terms{c.pcr}).Digest(); (derr == nil) != (err == nil) {
			t.Errorf("%s: Check says %v, Digest %v", name, err, derr)
		}
		if err != nil {
			// nil: whatever is refused is refused before the TPM is asked
			if (authpolicy.Terms{c.pcr}).Satisfy(nil, nil) == nil {
				t.Errorf("%s: Satisfy accepts it", name)
			}
		}
	}
	for i := range 24 {
		err := authpolicy.PCR{Bank: sha256, Values: values(sha256, 4, 7, i)}.Check()
		if resettable := i >= 16; (err != nil) != resettable {
			t.Errorf("PCR %d: %v", i, err)
		}
	}
}

// TestResettablePCRs: Check calls exactly those PCRs resettable that the TPM allows to
// be reset, or that it starts with ones for a dynamic launch.
func TestResettablePCRs(t *testing.T) {
	withCounter(t, func(tp transport.TPM, _ *nv.Counter, _ uint64) error {
		var reset []int
		for i := range 24 {
			if _, err := (tpm2.PCRReset{PCRHandle: tpm2.TPMHandle(i)}).Execute(tp); err == nil {
				reset = append(reset, i)
			}
		}
		if !slices.Contains(reset, 16) || !slices.Contains(reset, 23) {
			t.Errorf("the TPM resets %v", reset)
		}
		for _, i := range reset {
			if (authpolicy.PCR{Bank: crypto.SHA256, Values: values(crypto.SHA256, 4, i)}).Check() == nil {
				t.Errorf("Check accepts PCR %d, which the TPM resets", i)
			}
		}
		return nil
	})
}
