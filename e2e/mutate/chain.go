package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// nonce is the verifier's nonce. It is fixed, because this test does not ask whether a
// quote is fresh.
var nonce = []byte("kleidi mutated logs, 32 bytes ok")

// chain holds the steps between evidence and its acceptance.
type chain struct {
	verify func(e *attest.Evidence, nonce []byte, bank crypto.Hash, pcrs []int) (*attest.Result, error)
	// verifyLogs is the part of verify after the quote.
	verifyLogs func(firmware, userspace []byte, bank crypto.Hash, quoted eventlog.PCRs) (*eventlog.Log, error)
	judge      func(p *bootpolicy.BootPolicy, log *eventlog.Log, quoted eventlog.PCRs) *bootpolicy.Verdict
}

// real is the chain of serve's gate and of a remote verifier.
var real = chain{attest.Verify, attest.VerifyLogs, bootpolicy.Judge}

// stage names the step of the chain that refused.
type stage string

const (
	accepted   stage = "accepted"
	byParser   stage = "parser"
	byReplay   stage = "replay"
	byOther    stage = "go-attestation"
	byPolicy   stage = "boot policy"
	unexpected stage = "quote" // the quotes themselves are valid
)

// run takes an attempt through the chain, including the quote if the attempt has one.
func (c chain) run(a *attempt) stage {
	e, d := &a.evidence, a.demand
	var log *eventlog.Log
	var err error
	if e.Quote.Attest != nil {
		var result *attest.Result
		if result, err = c.verify(e, nonce, d.bank, d.pcrs); err == nil {
			log = result.Log
		}
	} else {
		log, err = c.verifyLogs(e.FirmwareLog, e.UserspaceLog, d.bank, e.Quote.PCRs)
	}
	switch {
	case err != nil:
		return refusedBy(err)
	case !c.judge(d.policy, log, e.Quote.PCRs).Accepted:
		return byPolicy
	}
	return accepted
}

func refusedBy(err error) stage {
	var mismatch *eventlog.MismatchError
	var bank *eventlog.BankError
	switch text := err.Error(); {
	case errors.As(err, &mismatch) || errors.As(err, &bank) || strings.HasPrefix(text, "event log: "):
		return byReplay
	case strings.HasPrefix(text, "firmware event log: ") || strings.HasPrefix(text, "userspace event log: "):
		return byParser
	case strings.HasPrefix(text, "go-attestation"):
		return byOther
	}
	return unexpected
}

// signer makes quotes of any boot. Verify does not ask whose key it is.
type signer struct {
	key    *ecdsa.PrivateKey
	public []byte
}

func newSigner() (*signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		return nil, err
	}
	return &signer{key, tpm2.Marshal(tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, Restricted: true, SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
			CurveID: tpm2.TPMECCNistP256}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}}),
	})}, nil
}

// quote signs these values, as a TPM with these values does.
func (s *signer) quote(bank crypto.Hash, values map[int][]byte) (*keys.Quote, error) {
	pcrs := slices.Sorted(maps.Keys(values))
	h := sha256.New()
	for _, i := range pcrs {
		h.Write(values[i])
	}
	statement := tpm2.Marshal(tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote, ExtraData: tpm2.TPM2BData{Buffer: nonce},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: authpolicy.Selection(bank, pcrs), PCRDigest: tpm2.TPM2BDigest{Buffer: h.Sum(nil)}}),
	})
	digest := sha256.Sum256(statement)
	r, t, err := ecdsa.Sign(rand.Reader, s.key, digest[:])
	if err != nil {
		return nil, fmt.Errorf("sign a quote: %w", err)
	}
	return &keys.Quote{AKPublic: s.public, Attest: statement, Bank: bank, PCRs: values,
		Signature: tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: t.Bytes()}})})}, nil
}
