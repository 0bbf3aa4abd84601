package verifier

import (
	wire "github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// The messages that every exchange has.
type (
	Challenge = wire.Challenge
	Statement = wire.Statement
	LogPart   = wire.LogPart
	Refusal   = wire.Refusal
)

const (
	partSize   = wire.PartSize
	maxMessage = wire.MaxMessage
	maxReason  = wire.MaxReason
	maxHint    = wire.MaxHint
	maxName    = wire.MaxName
)

func toHello(h *Hello) *remote.Hello {
	return &remote.Hello{Cluster: h.GetCluster(), Node: h.GetNode(), EK: h.GetEk(), EKCertificate: h.GetEkCertificate(),
		AK: h.GetAk(), SRK: h.GetSrk(), NonceTPM: h.GetNonceTpm(), Key: h.GetKey()}
}

func fromHello(h *remote.Hello) *FromAttester {
	return &FromAttester{Message: &FromAttester_Hello{&Hello{Cluster: h.Cluster, Node: h.Node, Ek: h.EK, EkCertificate: h.EKCertificate,
		Ak: h.AK, Srk: h.SRK, NonceTpm: h.NonceTPM, Key: h.Key}}}
}

func fromChallenge(c *remote.Challenge) *FromVerifier {
	return &FromVerifier{Message: &FromVerifier_Challenge{wire.FromChallenge(c)}}
}

func fromEvidence(e *remote.Evidence) *FromAttester {
	return &FromAttester{Message: &FromAttester_Statement{wire.FromEvidence(e)}}
}
