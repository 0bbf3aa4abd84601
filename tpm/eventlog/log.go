package eventlog

import (
	"bytes"
	"crypto"
	_ "crypto/sha1" // crypto.Hash.New needs them
	_ "crypto/sha256"
	_ "crypto/sha3"
	_ "crypto/sha512"
	"fmt"
	"slices"
)

// Limits on what is parsed, checked before anything is allocated. Real logs
// hold tens to hundreds of events in 5 to 200 KB.
const (
	MaxSize   = 16 << 20 // bytes of a log
	MaxEvents = 1 << 16  // events of a log
)

// NumPCRs is the number of PCRs of a PC Client TPM.
const NumPCRs = 24

// NoPCR is the PCR of an event that names no PCR (0xffffffff in the log). In the
// specification such events are for information only (TCG PFP 1.06, SP 800-155 events).
const NoPCR = -1

// SM3 stands for TPM_ALG_SM3_256, which Go does not implement: its digests are
// kept, so that such a log round-trips, but SM3.Available is false and its bank
// does not replay.
const SM3 = crypto.Hash(1<<16 | 0x12)

// A Log is a firmware event log, perhaps with userspace events appended. A Log that is
// built by hand needs only Banks and Events.
type Log struct {
	// Banks in the order of the log's header.
	Banks  []crypto.Hash
	Events []Event

	spec specID // as parsed; zero: see specID.orDefault
}

// Event is one measurement. Only a digest of a verified bank can be trusted.
type Event struct {
	// PCR may be a PCR that no TPM has: see extends.
	PCR           int
	UntrustedType EventType
	// Digests holds at most one digest per bank, in the log's order.
	Digests       []Digest
	UntrustedData []byte
}

// Digest is the value that was extended into one bank.
type Digest struct {
	Hash  crypto.Hash
	Value []byte // Hash.Size bytes; 32 for SM3
}

// Measure returns the event of hashing measured into every bank and logging data. Use
// it to make [Event] values by hand.
func Measure(banks []crypto.Hash, pcr int, typ EventType, measured, data []byte) Event {
	e := Event{PCR: pcr, UntrustedType: typ, UntrustedData: data}
	for _, bank := range banks {
		e.Digests = append(e.Digests, Digest{bank, sum(bank, measured)})
	}
	return e
}

// Informational returns an event that extends nothing (EV_NO_ACTION): all its
// digests are zero.
func Informational(banks []crypto.Hash, pcr int, data []byte) Event {
	e := Event{PCR: pcr, UntrustedType: NoAction, UntrustedData: data}
	for _, bank := range banks {
		e.Digests = append(e.Digests, Digest{bank, make([]byte, size(bank))})
	}
	return e
}

// Digest returns the event's digest for a bank, or nil.
func (e Event) Digest(bank crypto.Hash) []byte {
	for _, d := range e.Digests {
		if d.Hash == bank {
			return d.Value
		}
	}
	return nil
}

// Proves reports whether each of the event's digests is the hash of measured, in all
// banks that Go can compute and in at least one. A match in any one bank would not be
// enough: a quote proves only one of the banks, and Proves does not know which.
func (e Event) Proves(measured []byte) bool {
	n := 0
	for _, d := range e.Digests {
		if !d.Hash.Available() {
			continue
		}
		if !bytes.Equal(d.Value, sum(d.Hash, measured)) {
			return false
		}
		n++
	}
	return n > 0
}

// mayBe reports whether any of the event's digests is the hash of measured.
func (e Event) mayBe(measured []byte) bool {
	return slices.ContainsFunc(e.Digests, func(d Digest) bool {
		return d.Hash.Available() && bytes.Equal(d.Value, sum(d.Hash, measured))
	})
}

// extends reports whether the event was extended into its PCR. No TPM can extend a PCR
// that it does not have.
func (e Event) extends() bool {
	return e.UntrustedType != NoAction && e.PCR >= 0 && e.PCR < NumPCRs
}

// Only returns the log with the digests of one bank, as if the TPM had no other bank.
// So a log with an SM3 bank, or with userspace events that lack some banks, becomes a
// log that every parser accepts. An event without a digest of that bank keeps no
// digest, and fails to replay.
func (l *Log) Only(bank crypto.Hash) *Log {
	o := &Log{Banks: []crypto.Hash{bank}, spec: l.spec, Events: make([]Event, len(l.Events))}
	for i, e := range l.Events {
		digest := e.Digest(bank)
		e.Digests = nil
		if digest != nil {
			e.Digests = []Digest{{bank, digest}}
		}
		o.Events[i] = e
	}
	return o
}

// Append adds events that were measured after the events of the log, such as those of
// [ParseUserspace].
func (l *Log) Append(events []Event) { l.Events = append(l.Events, events...) }

// BankName returns a bank's name as tpm2-tools and systemd write it: "sha256".
func BankName(bank crypto.Hash) string {
	for _, a := range algorithms {
		if a.hash == bank {
			return a.name
		}
	}
	return fmt.Sprintf("bank %#x", uint(bank))
}

// algorithms are the banks that a log may have (TCG Algorithm Registry).
var algorithms = []struct {
	id   uint16 // TPM_ALG_ID
	hash crypto.Hash
	size int
	name string
}{
	{0x0004, crypto.SHA1, 20, "sha1"},
	{0x000b, crypto.SHA256, 32, "sha256"},
	{0x000c, crypto.SHA384, 48, "sha384"},
	{0x000d, crypto.SHA512, 64, "sha512"},
	{0x0012, SM3, 32, "sm3_256"},
	{0x0027, crypto.SHA3_256, 32, "sha3_256"},
	{0x0028, crypto.SHA3_384, 48, "sha3_384"},
	{0x0029, crypto.SHA3_512, 64, "sha3_512"},
}

// bankOf returns the bank with that TPM_ALG_ID, or 0.
func bankOf(id uint16) crypto.Hash {
	for _, a := range algorithms {
		if a.id == id {
			return a.hash
		}
	}
	return 0
}

// algID returns a bank's TPM_ALG_ID, or 0 (TPM_ALG_ERROR).
func algID(bank crypto.Hash) uint16 {
	for _, a := range algorithms {
		if a.hash == bank {
			return a.id
		}
	}
	return 0
}

// size returns the length of a bank's digests, or 0.
func size(bank crypto.Hash) int {
	for _, a := range algorithms {
		if a.hash == bank {
			return a.size
		}
	}
	return 0
}

// sum hashes the parts. A bank that Go does not implement gives zeros.
func sum(bank crypto.Hash, parts ...[]byte) []byte {
	if !bank.Available() {
		return make([]byte, size(bank))
	}
	h := bank.New()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// specID is the rest of the Spec ID event, TCG_EfiSpecIDEvent.
type specID struct {
	platformClass uint32
	minor, major  uint8
	errata        uint8
	uintnSize     uint8
	vendorInfo    []byte
}
