package bootstate_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/big"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

func TestSignAndVerify(t *testing.T) {
	for name, signer := range signers() {
		for bank := range authpolicy.Banks {
			for _, ref := range [][]byte{nil, {1}, bootstate.Ref([16]byte{1}, 7)} {
				s := sign(t, signer, values(bank, 4, 7, 11), ref, "kernel 6.12")
				got := parse(t, marshal(t, file(t, s))).States()[0]
				if err := got.Verify(signer.Public()); err != nil {
					t.Errorf("%s %v %x: %v", name, bank, ref, err)
				}
				if !slices.Equal(got.PCRs, []int{4, 7, 11}) || got.What != "kernel 6.12" || got.Bank != bank || !bytes.Equal(got.Ref, ref) {
					t.Errorf("%s: %+v", name, got)
				}
			}
		}
	}
}

// TestVerifyRefuses: nothing that the signature covers can be changed, nor can a part
// of the digest become the policyRef.
func TestVerifyRefuses(t *testing.T) {
	ref := bootstate.Ref([16]byte{1}, 7)
	for name, signer := range signers() {
		good := sign(t, signer, values(crypto.SHA256, 4, 7, 11), ref, "")
		for what, c := range map[string]struct {
			change func(*bootstate.State)
			want   error // nil means any
		}{
			"digest":         {func(s *bootstate.State) { s.Digest[31] ^= 1 }, bootstate.ErrSignature},
			"ref":            {func(s *bootstate.State) { s.Ref[0] ^= 1 }, bootstate.ErrSignature},
			"shorter ref":    {func(s *bootstate.State) { s.Ref = s.Ref[:31] }, bootstate.ErrSignature},
			"no ref":         {func(s *bootstate.State) { s.Ref = nil }, bootstate.ErrSignature},
			"moved border":   {func(s *bootstate.State) { s.Digest, s.Ref = append(s.Digest, s.Ref[0]), s.Ref[1:] }, nil},
			"signature":      {func(s *bootstate.State) { s.Signature[len(s.Signature)-1] ^= 1 }, bootstate.ErrSignature},
			"no signature":   {func(s *bootstate.State) { s.Signature = nil }, nil},
			"more signature": {func(s *bootstate.State) { s.Signature = append(s.Signature, 0) }, bootstate.ErrSignature},
			"fingerprint":    {func(s *bootstate.State) { s.KeyFingerprint[0] ^= 1 }, bootstate.ErrOtherKey},
			"note":           {func(s *bootstate.State) { s.What = "\n" }, nil},
		} {
			s := good
			s.Digest, s.Ref, s.Signature = bytes.Clone(s.Digest), bytes.Clone(s.Ref), bytes.Clone(s.Signature)
			c.change(&s)
			if err := s.Verify(signer.Public()); err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%s, %s: %v, want %v", name, what, err, c.want)
			}
		}
		for other, o := range signers() {
			if other != name && !errors.Is(good.Verify(o.Public()), bootstate.ErrOtherKey) {
				t.Errorf("a state by %s verifies by %s", name, other)
			}
		}
	}
}

// TestSignRefuses: a state that protects nothing is not signed.
func TestSignRefuses(t *testing.T) {
	zero, short := values(crypto.SHA256, 4, 11), values(crypto.SHA256, 4, 11)
	zero.Values[11] = make([]byte, 32)
	short.Values[4] = short.Values[4][:31]
	for name, c := range map[string]struct {
		pcr  authpolicy.PCR
		ref  []byte
		what string
		says string
	}{
		"no PCRs":       {values(crypto.SHA256), nil, "", "no PCRs"},
		"SHA-1":         {values(crypto.SHA1, 4), nil, "", "want SHA-256 or SHA-384"},
		"all zero":      {zero, nil, "", "PCR 11 is all zero"},
		"short":         {short, nil, "", "31 bytes, want 32"},
		"resettable":    {values(crypto.SHA256, 4, 16), nil, "", "PCR 16 can be reset"},
		"no such PCR":   {values(crypto.SHA256, 24), nil, "", "PCR 24 does not exist"},
		"long ref":      {values(crypto.SHA256, 4), make([]byte, 33), "", "33 bytes"},
		"long note":     {values(crypto.SHA256, 4), nil, strings.Repeat("x", 161), "161 characters"},
		"bad note":      {values(crypto.SHA256, 4), nil, "\a", "can't be shown"},
		"PCR 11, alone": {values(crypto.SHA256, 11), nil, "", ""},
	} {
		_, err := bootstate.Sign(signers()["P-256"], c.pcr, c.ref, c.what)
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
}

// token signs something else, or nothing.
type token struct {
	crypto.Signer
	err error
}

func (t token) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	if t.err != nil {
		return nil, t.err
	}
	digest = bytes.Clone(digest)
	digest[0] ^= 1
	return t.Signer.Sign(r, digest, o)
}

// TestSignerThatErrs: a signature that does not verify is never handed out.
func TestSignerThatErrs(t *testing.T) {
	broken := errors.New("token removed")
	if _, err := bootstate.Sign(token{Signer: signers()["RSA"], err: broken}, values(crypto.SHA256, 4), nil, ""); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	if _, err := bootstate.Sign(token{Signer: signers()["RSA"]}, values(crypto.SHA256, 4), nil, ""); !errors.Is(err, bootstate.ErrSignature) {
		t.Errorf("%v", err)
	}
	for name, c := range map[string]struct {
		key  crypto.Signer
		says string
	}{
		"P-521":    {must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)), "unsupported curve; want P-256 or P-384; make one"},
		"RSA-1024": {weak(), "unsupported size; want 2048, 3072 or 4096 bits; make one"},
	} {
		if _, err := bootstate.Sign(c.key, values(crypto.SHA256, 4), nil, ""); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// weak is an RSA key that Go no longer makes.
func weak() crypto.Signer {
	k := *signers()["RSA"].(*rsa.PrivateKey)
	k.N = new(big.Int).Rsh(k.N, 1024)
	return &k
}

// TestRef: the vector is frozen; slots are sealed to it.
func TestRef(t *testing.T) {
	cluster := [16]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	message, err := hex.DecodeString("0000000000000018" + hex.EncodeToString([]byte("kleidi boot state ref v1")) +
		"0000000000000010" + "000102030405060708090a0b0c0d0e0f" + "0000000000000008" + "0000000000000005")
	if err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(message)
	if got := bootstate.Ref(cluster, 5); !bytes.Equal(got, want[:]) {
		t.Errorf("%x, want %x", got, want)
	}
	const vector = "c8ec1ae1e2b889253f2c506c80f9d55849e03b9c60e00bb3ce6596264bd65a23"
	if got := hex.EncodeToString(bootstate.Ref(cluster, 5)); got != vector {
		t.Errorf("%s, want %s", got, vector)
	}
	seen := map[string]bool{}
	for _, c := range [][16]byte{{}, {1}, cluster} {
		for _, g := range []uint64{0, 1, 256, 1 << 63} {
			seen[string(bootstate.Ref(c, g))] = true
		}
	}
	if len(seen) != 12 {
		t.Errorf("%d different policyRefs, want 12", len(seen))
	}
}
