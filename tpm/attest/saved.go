package attest

import (
	"crypto"
	"fmt"

	"github.com/google/go-tpm-tools/proto/attest"
	pb "github.com/google/go-tpm-tools/proto/tpm"
	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	"github.com/beezy-dev/kleidi/tpm/attest/internal/readonce"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// MaxEvidence bounds saved evidence, in bytes: enough for a log and some quotes.
const MaxEvidence = eventlog.MaxSize + 1<<16

// Marshal returns evidence to be saved, for [ParseEvidence] and for other verifiers: a
// message Attestation of go-tpm-tools (proto/attest.proto) in protobuf's binary form.
// That message has one log. Userspace events follow the firmware's events in it, and
// the log then has only the quoted bank, because systemd may leave other banks out.
func (e *Evidence) Marshal() ([]byte, error) {
	log := e.FirmwareLog
	if len(e.UserspaceLog) > 0 {
		merged, err := parseLogs(e.FirmwareLog, e.UserspaceLog)
		if err != nil {
			return nil, err
		}
		log = merged.Only(e.Quote.Bank).Encode()
	}
	values := map[uint32][]byte{}
	for pcr, value := range e.Quote.PCRs {
		values[uint32(pcr)] = value
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(&attest.Attestation{
		AkPub: e.Quote.AKPublic,
		Quotes: []*pb.Quote{{Quote: e.Quote.Attest, RawSig: e.Quote.Signature,
			Pcrs: &pb.PCRs{Hash: pb.HashAlgo(authpolicy.Banks[e.Quote.Bank]), Pcrs: values}}},
		EventLog: log,
	})
}

// ParseEvidence reads saved evidence of at most [MaxEvidence] bytes. It refuses bytes
// that two readers could read in two ways, see [readonce.Check]. There must be exactly one
// quote over bank; ParseEvidence ignores quotes over other banks, and fields that
// Evidence has no place for, such as a certificate of the attestation key. Do not
// believe the result before [Verify].
func ParseEvidence(b []byte, bank crypto.Hash) (*Evidence, error) {
	if len(b) > MaxEvidence {
		return nil, fmt.Errorf("saved evidence: more than %d bytes", MaxEvidence)
	}
	saved := &attest.Attestation{}
	if err := readonce.Check(b, saved.ProtoReflect().Descriptor()); err != nil {
		return nil, fmt.Errorf("saved evidence: %w", err)
	}
	if err := proto.Unmarshal(b, saved); err != nil {
		return nil, fmt.Errorf("saved evidence: %w", err)
	}
	var quotes []*pb.Quote
	for _, q := range saved.GetQuotes() {
		if q.GetPcrs().GetHash() == pb.HashAlgo(authpolicy.Banks[bank]) {
			quotes = append(quotes, q)
		}
	}
	if len(quotes) != 1 {
		return nil, fmt.Errorf("saved evidence: it has %d quotes over %s, want one", len(quotes), eventlog.BankName(bank))
	}
	values, err := readValues(quotes[0].GetPcrs().GetPcrs())
	if err != nil {
		return nil, fmt.Errorf("saved evidence: %w", err)
	}
	return &Evidence{
		Quote: keys.Quote{AKPublic: saved.GetAkPub(), Attest: quotes[0].GetQuote(), Signature: quotes[0].GetRawSig(),
			Bank: bank, PCRs: values},
		FirmwareLog: saved.GetEventLog(),
	}, nil
}

func readValues(saved map[uint32][]byte) (map[int][]byte, error) {
	values := map[int][]byte{}
	for pcr, value := range saved {
		if pcr >= eventlog.NumPCRs || len(value) == 0 {
			return nil, fmt.Errorf("PCR %d does not exist or has no value", pcr)
		}
		values[int(pcr)] = value
	}
	return values, nil
}

// Nonce returns the nonce in the quote. Compare it with a nonce that you chose: alone
// it proves nothing.
func (e *Evidence) Nonce() ([]byte, error) {
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Quote.Attest)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	return a.ExtraData.Buffer, nil
}
