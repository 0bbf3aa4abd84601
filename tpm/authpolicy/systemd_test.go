package authpolicy_test

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"os"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// measured is what the stub and systemd-pcrphase measure of the image that
// testdata/systemd252.pcrsig was made for, with systemd-measure 252:
//
//	printf 'a kernel' > linux; printf 'ID=example\n' > osrel
//	printf 'root=/dev/sda ro' > cmdline; printf 'an initrd' > initrd
//	systemd-measure sign --linux=linux --osrel=osrel --cmdline=cmdline --initrd=initrd --bank=sha256 --bank=sha384
//	    --phase=enter-initrd:leave-initrd --private-key=key.pem --public-key=systemd252.pem
var measured = []string{".linux\x00", "a kernel", ".osrel\x00", "ID=example\n", ".cmdline\x00", "root=/dev/sda ro", ".initrd\x00", "an initrd",
	"enter-initrd", "leave-initrd"}

var algorithms = map[string]crypto.Hash{"sha256": crypto.SHA256, "sha384": crypto.SHA384}

// TestSystemdSignature: what systemd signed authorizes on a TPM whose PCR 11 the stub
// and systemd have extended, in that phase and in no later one. Up to 259, systemd
// signed the states of the SHA-384 bank by SHA-384, which it never accepted itself;
// such states do not get in the way of others.
func TestSystemdSignature(t *testing.T) {
	raw, err := os.ReadFile("testdata/systemd252.pcrsig")
	if err != nil {
		t.Fatal(err)
	}
	var banks map[string][]struct {
		PCRs []int  `json:"pcrs"`
		Pol  string `json:"pol"`
		Sig  []byte `json:"sig"`
	}
	if err := json.Unmarshal(raw, &banks); err != nil || len(banks) != len(algorithms) {
		t.Fatal(len(banks), err)
	}
	key := goldenKey(t, "systemd252.pem")
	public := must(authpolicy.PublicKey(key))
	withCounter(t, func(tp transport.TPM, _ *nv.Counter, _ uint64) error {
		for _, m := range measured {
			if err := extend11(tp, m); err != nil {
				return err
			}
		}
		satisfy := func(states ...authpolicy.SignedState) error {
			_, err := digestOnTPM(tp, authpolicy.Terms{authpolicy.Authorized{Key: public, States: states}, presentPCRs(t, tp, crypto.SHA256, 7)})
			return err
		}
		var states []authpolicy.SignedState
		for name, bank := range algorithms {
			for _, s := range banks[name] {
				state := authpolicy.SignedState{Bank: bank, PCRs: s.PCRs, Digest: must(hex.DecodeString(s.Pol)), Signature: must(authpolicy.Signature(key, s.Sig))}
				if digest, err := authpolicy.ApprovedDigest(presentPCRs(t, tp, bank, 11)); err != nil || !bytes.Equal(digest, state.Digest) {
					t.Errorf("%s: %x, %v; systemd signed %x", name, digest, err, state.Digest)
				}
				wantOnly(t, name, satisfy(state), map[crypto.Hash]error{crypto.SHA256: nil, crypto.SHA384: authpolicy.ErrSignature}[bank])
				states = append(states, state)
			}
		}
		for range 2 {
			if err := satisfy(states...); err != nil {
				t.Errorf("%v first: %v", states[0].Bank, err)
			}
			slices.Reverse(states)
		}
		if err := extend11(tp, "sysinit"); err != nil {
			return err
		}
		wantOnly(t, "a later phase", satisfy(states...), authpolicy.ErrNoSignedState)
		return nil
	})
}

func extend11(tp transport.TPM, data string) error {
	var digests []tpm2.TPMTHA
	for hash, id := range authpolicy.Banks {
		h := hash.New()
		h.Write([]byte(data))
		digests = append(digests, tpm2.TPMTHA{HashAlg: id, Digest: h.Sum(nil)})
	}
	_, err := tpm2.PCRExtend{PCRHandle: tpm2.TPMHandle(11), Digests: tpm2.TPMLDigestValues{Digests: digests}}.Execute(tp)
	return err
}
