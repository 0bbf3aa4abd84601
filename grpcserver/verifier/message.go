package verifier

import (
	"crypto"

	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

const (
	// partSize is how much of a log travels in one message, in bytes.
	partSize = 128 << 10
	// maxMessage bounds a message, in bytes: a part of a log, or a Hello with a
	// certificate.
	maxMessage = partSize + 4<<10
)

var bankNames = map[crypto.Hash]string{crypto.SHA256: "sha256", crypto.SHA384: "sha384"}

func bankOf(name string) crypto.Hash {
	for h, s := range bankNames {
		if s == name {
			return h
		}
	}
	return 0
}

func toHello(h *Hello) *remote.Hello {
	return &remote.Hello{Cluster: h.GetCluster(), Node: h.GetNode(), EK: h.GetEk(), EKCertificate: h.GetEkCertificate(),
		AK: h.GetAk(), SRK: h.GetSrk(), NonceTPM: h.GetNonceTpm(), Key: h.GetKey()}
}

func fromHello(h *remote.Hello) *FromAttester {
	return &FromAttester{Message: &FromAttester_Hello{&Hello{Cluster: h.Cluster, Node: h.Node, Ek: h.EK, EkCertificate: h.EKCertificate,
		Ak: h.AK, Srk: h.SRK, NonceTpm: h.NonceTPM, Key: h.Key}}}
}

func toChallenge(c *Challenge) *remote.Challenge {
	out := &remote.Challenge{Nonce: c.GetNonce(), Credential: c.GetCredential(), Secret: c.GetEncryptedSecret(), Bank: bankOf(c.GetBank())}
	for _, i := range c.GetPcrs() {
		out.PCRs = append(out.PCRs, int(i))
	}
	return out
}

func fromChallenge(c *remote.Challenge) *FromVerifier {
	out := &Challenge{Nonce: c.Nonce, Credential: c.Credential, EncryptedSecret: c.Secret, Bank: bankNames[c.Bank]}
	for _, i := range c.PCRs {
		out.Pcrs = append(out.Pcrs, uint32(i))
	}
	return &FromVerifier{Message: &FromVerifier_Challenge{out}}
}

// toEvidence leaves out the logs, which come after it.
func toEvidence(s *Statement) *remote.Evidence {
	e := &remote.Evidence{Proof: s.GetProof(), Attest: s.GetAttest(), Signature: s.GetSignature(), PCRs: map[int][]byte{}}
	for i, v := range s.GetPcrs() {
		e.PCRs[int(i)] = v
	}
	return e
}

func fromEvidence(e *remote.Evidence) *FromAttester {
	s := &Statement{Proof: e.Proof, Attest: e.Attest, Signature: e.Signature, Pcrs: map[uint32][]byte{}}
	for i, v := range e.PCRs {
		s.Pcrs[uint32(i)] = v
	}
	return &FromAttester{Message: &FromAttester_Statement{s}}
}

// Bounds of texts that come from the other side or quote it, in runes.
const (
	maxReason = 600
	maxHint   = 300
	maxName   = 80
)
