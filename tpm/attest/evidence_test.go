package attest_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"os"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

var nonce = []byte("a nonce of the verifier, 32 byte")

// demand is a verifier's demand.
type demand struct {
	nonce []byte
	bank  crypto.Hash
	pcrs  []int
}

var ordinary = demand{nonce, crypto.SHA256, []int{4, 7, 11}}

func attester(m *tpmtest.Machine) *attest.Attester {
	return &attest.Attester{Device: m.TPM(), Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}}
}

func collect(t *testing.T, m *tpmtest.Machine, d demand) *attest.Evidence {
	t.Helper()
	e, err := attester(m).Collect(t.Context(), nil, d.nonce, d.bank, d.pcrs)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func (d demand) verify(e *attest.Evidence) error {
	_, err := attest.Verify(e, d.nonce, d.bank, d.pcrs)
	return err
}

// forger signs statements that no TPM would sign, with a key that it claims to be a
// TPM's. All its forgeries are perfectly signed.
type forger struct {
	key    *ecdsa.PrivateKey
	public tpm2.TPMTPublic
	attest tpm2.TPMSAttest
	info   tpm2.TPMSQuoteInfo
	quote  keys.Quote
}

// forge makes evidence again with a quote by the forger's key, as changed by change.
func forge(t *testing.T, e *attest.Evidence, change func(*forger)) *attest.Evidence {
	t.Helper()
	f := &forger{quote: e.Quote}
	var err error
	if f.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](e.Quote.AKPublic)
	if err != nil {
		t.Fatal(err)
	}
	statement, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Quote.Attest)
	if err != nil {
		t.Fatal(err)
	}
	info, err := statement.Attested.Quote()
	if err != nil {
		t.Fatal(err)
	}
	f.public, f.attest, f.info = *public, *statement, *info
	f.public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: f.key.X.FillBytes(make([]byte, 32))},
		Y: tpm2.TPM2BECCParameter{Buffer: f.key.Y.FillBytes(make([]byte, 32))}})
	f.quote.PCRs = map[int][]byte{}
	for i, v := range e.Quote.PCRs {
		f.quote.PCRs[i] = slices.Clone(v)
	}
	change(f)
	if f.attest.Type == tpm2.TPMSTAttestQuote {
		f.attest.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &f.info)
	}
	f.quote.AKPublic, f.quote.Attest = tpm2.Marshal(f.public), tpm2.Marshal(f.attest)
	f.quote.Signature = f.sign(t, f.quote.Attest)
	return &attest.Evidence{Quote: f.quote, FirmwareLog: e.FirmwareLog, UserspaceLog: e.UserspaceLog}
}

func (f *forger) sign(t *testing.T, statement []byte) []byte {
	t.Helper()
	digest := sha256.Sum256(statement)
	r, s, err := ecdsa.Sign(rand.Reader, f.key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s.Bytes()}})})
}

// over changes the forged quote to cover these PCRs, with a digest that matches the
// values.
func (f *forger) over(bank crypto.Hash, pcrs ...int) {
	f.info.PCRSelect = authpolicy.Selection(bank, pcrs)
	f.digest(pcrs...)
}

func (f *forger) digest(pcrs ...int) {
	h := sha256.New()
	for _, i := range pcrs {
		h.Write(f.quote.PCRs[i])
	}
	f.info.PCRDigest.Buffer = h.Sum(nil)
}

// edit changes the firmware's log of evidence.
func edit(t *testing.T, e *attest.Evidence, change func(*eventlog.Log)) *attest.Evidence {
	t.Helper()
	log, err := eventlog.Parse(e.FirmwareLog)
	if err != nil {
		t.Fatal(err)
	}
	change(log)
	edited := *e
	edited.FirmwareLog = log.Encode()
	return &edited
}

// phased is a boot whose user space measures its phases, into a separate log.
func phased() simboot.Boot {
	b := simboot.Baseline(simboot.UKI)
	b.Phases = simboot.AllPhases
	return b
}

func replaceFile(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}
