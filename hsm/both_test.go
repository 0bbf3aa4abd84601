//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/sealtest"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// Two-of-two with real backends: a TPM and a token.

// newTPM returns the wrapper of a fresh machine's TPM.
func newTPM(t *testing.T) (*tpm.Wrapper, *tpmtest.Machine) {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	counter := must[*nv.Counter](t)(nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{}))
	device := m.TPM()
	gate := &attest.Gate{Attester: attest.Attester{Device: device, Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}},
		Counter: counter, Bank: crypto.SHA256}
	w := tpm.NewWrapper(tpm.Config{Device: device, Node: "alpha", Counter: counter,
		State: func(ctx context.Context) (tpm.BootState, error) { return gate.State(ctx) }})
	must[string](t)(w.Provision(t.Context()))
	return w, m
}

// pair returns a wrapper that needs a TPM and a token.
func pair(first *tpm.Wrapper, second *Wrapper) *both.Wrapper {
	return &both.Wrapper{Kind: "tpm-and-pkcs11", Node: "alpha", First: first, Second: second}
}

// TestTwoOfTwoConformance runs the suite with a TPM and each module. The other wrapper has
// another token with the same TPM, or another TPM with the same token.
func TestTwoOfTwoConformance(t *testing.T) {
	soft := softHSM(t)
	softA, softB := *soft, *soft
	softB.tokens = soft.tokens[1:]
	first, _ := newTPM(t)
	elsewhere, _ := newTPM(t)
	for _, b := range [][2]*backend{{&softA, &softB}, {nss(t), nss(t)}} {
		token, other := b[0].generated(t, 0, "kek"), b[1].generated(t, 0, "kek")
		for name, h := range map[string]sealtest.Harness{
			"another token": {Other: pair(first, other), OtherCause: seal.CauseNoSlot},
			"another TPM":   {Other: pair(elsewhere, token), OtherCause: seal.CauseOtherTPM},
		} {
			t.Run(b[0].name+"/"+name, func(t *testing.T) {
				h.Wrapper, h.Stride = pair(first, token), 11
				sealtest.Run(t, func(*testing.T) sealtest.Harness { return h })
			})
		}
	}
}

// TestTwoOfTwoRefuses: without either backend the pair neither wraps nor opens. The error
// names the backend that fails, and holds no secret. The pair works again afterwards.
func TestTwoOfTwoRefuses(t *testing.T) {
	for _, b := range []*backend{softHSM(t), nss(t)} {
		t.Run(b.name, func(t *testing.T) {
			first, machine := newTPM(t)
			token := b.generated(t, 0, "kek")
			w, kek := pair(first, token), newKEK(t)
			slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
			secrets := secretsIn(t, w, slot, kek)
			refuses := func(cause seal.Cause, text string) {
				t.Helper()
				got, err := w.Unwrap(t.Context(), slot)
				if err == nil {
					got.Close()
				}
				checkFault(t, err, cause, text)
				holdsNone(t, fmt.Sprintf("%v %+v %#v", err, err, err), secrets)
			}

			was := machine.Current()
			other := was
			other.Kernel = "6.1.0-666-amd64"
			machine.Reboot(other)
			refuses(seal.CauseBootState, "did not boot as it did")
			machine.Reboot(was)

			setPIN(t, token, wrongPIN)
			refuses(seal.CauseCredentials, "PIN")
			_, err := w.Wrap(t.Context(), kek)
			checkFault(t, err, seal.CauseCredentials, "PIN")
			setPIN(t, token, testPIN)

			f := fault(token)
			f.slots = func([]uint) []uint { return nil }
			refuses(seal.CauseUnavailable, "the token is not there")
			f.slots = nil
			opens(t, w, slot, kek)
		})
	}
}

// secretsIn returns the secrets that no message may hold.
func secretsIn(t *testing.T, w *both.Wrapper, slot seal.Slot, kek *seal.Secret) map[string][]byte {
	t.Helper()
	first, second, err := both.Parts(slot)
	ok(t, err)
	secrets := map[string][]byte{"PIN": []byte(testPIN), "wrong PIN": []byte(wrongPIN)}
	add := func(name string, s *seal.Secret) { s.With(func(b []byte) { secrets[name] = bytes.Clone(b) }) }
	add("KEK", kek)
	for name, open := range map[string]func() (*seal.Secret, error){
		"share of the TPM":   func() (*seal.Secret, error) { return w.First.Unwrap(t.Context(), first) },
		"share of the token": func() (*seal.Secret, error) { return w.Second.Unwrap(t.Context(), second) },
	} {
		share := must[*seal.Secret](t)(open())
		add(name, share)
		share.Close()
	}
	return secrets
}

// holdsNone demands that text holds none of the secrets in any common encoding.
func holdsNone(t *testing.T, text string, secrets map[string][]byte) {
	t.Helper()
	for name, secret := range secrets {
		for form, needle := range map[string]string{
			"raw": string(secret), "hexadecimal": hex.EncodeToString(secret), "base64": base64.RawStdEncoding.EncodeToString(secret),
			"base64url": base64.RawURLEncoding.EncodeToString(secret), "decimal": strings.Trim(fmt.Sprint(secret), "[]"),
		} {
			if strings.Contains(text, needle) || form == "hexadecimal" && strings.Contains(strings.ToLower(text), needle) {
				t.Errorf("the %s (%s) is in: %.300s", name, form, text)
			}
		}
	}
}
