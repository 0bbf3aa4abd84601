package exchange

import (
	"crypto"
	"errors"
	"io"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/beezy-dev/kleidi/seal"
	protocol "github.com/beezy-dev/kleidi/tpm/attest/exchange"
)

const (
	// PartSize is the size of the part of a log in one message, in bytes.
	PartSize = 128 << 10
	// MaxMessage bounds a message, in bytes: a part of a log, or a first message with a
	// certificate.
	MaxMessage = PartSize + 4<<10
)

// Bounds of texts that come from the other side or quote it, in runes.
const (
	MaxReason = 600
	MaxHint   = 300
	MaxName   = 80
)

var bankNames = map[crypto.Hash]string{crypto.SHA256: "sha256", crypto.SHA384: "sha384"}

// BankName returns the name of a bank in messages.
func BankName(h crypto.Hash) string { return bankNames[h] }

// BankOf reads a result of BankName; 0 means no bank.
func BankOf(name string) crypto.Hash {
	for h, s := range bankNames {
		if s == name {
			return h
		}
	}
	return 0
}

// ToChallenge converts a challenge from its message.
func ToChallenge(c *Challenge) *protocol.Challenge {
	out := &protocol.Challenge{Nonce: c.GetNonce(), Credential: c.GetCredential(), Secret: c.GetEncryptedSecret(), Bank: BankOf(c.GetBank())}
	for _, i := range c.GetPcrs() {
		out.PCRs = append(out.PCRs, int(i))
	}
	return out
}

// FromChallenge converts a challenge to its message.
func FromChallenge(c *protocol.Challenge) *Challenge {
	out := &Challenge{Nonce: c.Nonce, Credential: c.Credential, EncryptedSecret: c.Secret, Bank: bankNames[c.Bank]}
	for _, i := range c.PCRs {
		out.Pcrs = append(out.Pcrs, uint32(i))
	}
	return out
}

// ToEvidence leaves out the logs, which come after the statement.
func ToEvidence(s *Statement) *protocol.Evidence {
	e := &protocol.Evidence{Proof: s.GetProof(), Attest: s.GetAttest(), Signature: s.GetSignature(), PCRs: map[int][]byte{}}
	for i, v := range s.GetPcrs() {
		e.PCRs[int(i)] = v
	}
	return e
}

// FromEvidence leaves out the logs, see [Parts].
func FromEvidence(e *protocol.Evidence) *Statement {
	s := &Statement{Proof: e.Proof, Attest: e.Attest, Signature: e.Signature, Pcrs: map[uint32][]byte{}}
	for i, v := range e.PCRs {
		s.Pcrs[uint32(i)] = v
	}
	return s
}

// Parts calls send with each part of the logs.
func Parts(e *protocol.Evidence, send func(*LogPart) error) error {
	for rest := e.FirmwareLog; len(rest) > 0; {
		n := min(len(rest), PartSize)
		if err := send(&LogPart{Firmware: rest[:n]}); err != nil {
			return err
		}
		rest = rest[n:]
	}
	for rest := e.UserspaceLog; len(rest) > 0; {
		n := min(len(rest), PartSize)
		if err := send(&LogPart{Userspace: rest[:n]}); err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}

// ReadLogs adds the parts that next returns to the evidence, until next returns io.EOF.
// A nil part stands for a message of another kind. The sender must have proven its TPM.
func ReadLogs(e *protocol.Evidence, next func() (*LogPart, error)) error {
	for {
		part, err := next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if part == nil {
			return ErrOrder
		}
		e.FirmwareLog = append(e.FirmwareLog, part.GetFirmware()...)
		e.UserspaceLog = append(e.UserspaceLog, part.GetUserspace()...)
		if len(e.FirmwareLog) > protocol.MaxLog || len(e.UserspaceLog) > protocol.MaxLog {
			return status.Errorf(codes.InvalidArgument, "an event log has more than %d MiB", protocol.MaxLog>>20)
		}
	}
}

// RefusalOf returns a refusal as a message, within the bounds.
func RefusalOf(r *protocol.Refusal) *Refusal {
	return &Refusal{Check: string(r.Check), Reason: seal.OneLine(r.Err.Error(), MaxReason), Hint: seal.OneLine(r.Hint, MaxHint)}
}

var ErrOrder = status.Error(codes.InvalidArgument, "a message arrived out of order; is the caller the same version of kleidi?")
