package remote

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

var cluster = seal.ClusterID{1, 2, 3}

// rig is a node and a verifier that knows it, with nothing between them but the
// attacker of a test.
type rig struct {
	*testing.T
	machine  *tpmtest.Machine
	verifier *Verifier
	attester *Attester
	wire     *wire
}

func newRig(t *testing.T, b simboot.Boot) *rig {
	t.Helper()
	m := tpmtest.New(t, b)
	r := &rig{T: t, machine: m, verifier: &Verifier{Cluster: cluster, Nodes: map[string]Registration{}}}
	r.wire = &wire{verifier: r.verifier}
	r.attester = &Attester{Cluster: cluster, Node: "alpha", Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}.Explaining, Channel: r.wire}
	r.verifier.Nodes["alpha"] = Registration{EK: ekOf(t, m), BootPolicy: policyOf(t, m, 0, 4, 7, 11)}
	r.use(ecdsaKey(t))
	return r
}

// use makes the verifier sign with a key, and the node demand that key.
func (r *rig) use(k *Key) { r.verifier.Keys, r.attester.Key = []*Key{k}, k.name }

func ekOf(t *testing.T, m *tpmtest.Machine) (digest string) {
	t.Helper()
	err := m.TPM().Do(t.Context(), func(tp transport.TPM) (err error) {
		digest, err = keys.EKDigest(tp)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

func policyOf(t *testing.T, m *tpmtest.Machine, pcrs ...int) *bootpolicy.BootPolicy {
	t.Helper()
	log, err := attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}.Read()
	if err != nil {
		t.Fatal(err)
	}
	p, err := bootpolicy.Record(log, crypto.SHA256, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func ecdsaKey(t *testing.T) *Key {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func rsaKey(t *testing.T, bits int) *Key {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// wire is a Channel with an attacker on it: each field that is set alters a message.
type wire struct {
	verifier  *Verifier
	exporter  []byte // on the attester's side, if it differs from the verifier's
	hello     func(*Hello)
	challenge func(*Challenge)
	evidence  func(*Evidence)
	last      *Passed
}

func exporter(first byte) []byte { return append([]byte{first}, make([]byte, ExporterSize-1)...) }

// Attest implements Channel.
func (w *wire) Attest(_ context.Context, h *Hello, answer func(*Challenge, []byte) (*Evidence, error)) ([]byte, error) {
	w.last = nil
	sent := *h
	if w.hello != nil {
		w.hello(&sent)
	}
	pending, c, err := w.verifier.Challenge(&sent, exporter(1))
	if err != nil {
		return nil, err
	}
	if w.challenge != nil {
		w.challenge(c)
	}
	own := w.exporter
	if own == nil {
		own = exporter(1)
	}
	e, err := answer(c, own)
	if err != nil {
		return nil, err
	}
	if w.evidence != nil {
		w.evidence(e)
	}
	if err := pending.Prove(e.Proof); err != nil {
		return nil, err
	}
	if w.last, err = pending.Judge(e); err != nil {
		return nil, err
	}
	return w.last.Sign()
}

// session runs f with a policy session like the one for opening a slot.
func (r *rig) session(f func(t transport.TPM, srk *keys.SRK, session tpm2.Session) error) error {
	return r.machine.TPM().Do(r.Context(), func(t transport.TPM) error {
		return keys.WithSRK(t, keys.Owner{}, nil, func(srk *keys.SRK) error {
			s, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, SessionNonceSize, tpm2.Salted(srk.Handle, srk.Public), tpm2.AESEncryption(128, tpm2.EncryptOut))
			if err != nil {
				return err
			}
			defer func() { _ = done() }()
			return f(t, srk, s)
		})
	})
}

// ask asks the verifier for a new session.
func (r *rig) ask() error {
	return r.session(func(t transport.TPM, srk *keys.SRK, s tpm2.Session) error {
		_, err := r.attester.Sign(r.Context(), t, srk, s.NonceTPM().Buffer)
		return err
	})
}

func (r *rig) refused(what string, err error, check Check, words string) {
	r.Helper()
	refusal, ok := errors.AsType[*Refusal](err)
	if !ok || refusal.Check != check || !strings.Contains(err.Error(), words) || refusal.Hint == "" {
		r.Errorf("%s: %v, want a refusal by %q with %q", what, err, check, words)
	}
}

// accepted demands that an undisturbed exchange succeeds.
func (r *rig) accepted(what string) {
	r.Helper()
	*r.wire = wire{verifier: r.verifier}
	if err := r.ask(); err != nil {
		r.Errorf("%s: %v", what, err)
	}
}

// policySigned gives the TPM a signature, as a slot's authorization policy demands.
func policySigned(t transport.TPM, key crypto.PublicKey, s tpm2.Session, ref []byte, signature tpm2.TPMTSignature) error {
	public, err := authpolicy.PublicKey(key)
	if err != nil {
		return err
	}
	return authpolicy.Terms{authpolicy.Signed{Key: public, Ref: ref, Sign: func([]byte) (tpm2.TPMTSignature, error) { return signature, nil }}}.Satisfy(t, s)
}

// copyOf returns evidence that an attacker has kept.
func copyOf(e *Evidence) *Evidence {
	c := *e
	c.Proof, c.Attest, c.Signature = bytes.Clone(e.Proof), bytes.Clone(e.Attest), bytes.Clone(e.Signature)
	c.FirmwareLog, c.UserspaceLog, c.PCRs = slices.Clone(e.FirmwareLog), slices.Clone(e.UserspaceLog), maps.Clone(e.PCRs)
	return &c
}
