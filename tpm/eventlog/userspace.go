package eventlog

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"

	"sigs.k8s.io/json"
)

// OSSeparator is the text that systemd 261 and later measures into PCRs 0 to 7, 9 and
// 12 to 14 when the firmware and the boot loader have handed over to the operating
// system.
const OSSeparator = "os-separator"

// userspaceRecord is one measurement in systemd's log: TCG's canonical event log in
// JSON, with liberties (systemd, src/shared/tpm2-util.c).
type userspaceRecord struct {
	PCR     *uint64 `json:"pcr"`
	NVIndex *uint64 `json:"nv_index"`
	Digests []struct {
		HashAlg string `json:"hashAlg"`
		Digest  string `json:"digest"`
	} `json:"digests"`
	Content struct {
		String string `json:"string"`
	} `json:"content"`
}

// ParseUserspace reads systemd's log (tpm2-measure.log, a JSON text sequence, RFC 7464)
// of at most [MaxSize] bytes and [MaxEvents] records. It returns the PCR measurements
// as EV_EVENT_TAG events whose data is the text that systemd logged. It skips
// measurements into NV indexes and into PCRs that do not exist, digests of unknown
// banks, and empty records between two record separators. It refuses a record without
// its end: systemd holds a lock on the file while it writes a record, so read the file
// under a shared lock.
func ParseUserspace(raw []byte) ([]Event, error) {
	if len(raw) > MaxSize {
		return nil, fmt.Errorf("userspace log: %d bytes, more than %d", len(raw), MaxSize)
	}
	if len(raw) == 0 {
		return nil, nil
	}
	if n := bytes.Count(raw, []byte{recordSeparator}); n > MaxEvents {
		return nil, fmt.Errorf("userspace log: %d records, more than %d", n, MaxEvents)
	}
	if raw[0] != recordSeparator {
		return nil, errors.New("userspace log: it does not begin with a record separator (RFC 7464)")
	}
	var events []Event
	n := 0
	records := bytes.Split(raw[1:], []byte{recordSeparator})
	for i, record := range records {
		if i < len(records)-1 && len(bytes.Trim(record, " \t\r\n")) == 0 {
			continue // two separators in a row (RFC 7464, 2.1)
		}
		e, ok, err := parseUserspaceRecord(record)
		if err != nil {
			return nil, fmt.Errorf("userspace log: record %d: %w", n, err)
		}
		if ok {
			events = append(events, e)
		}
		n++
	}
	return events, nil
}

const recordSeparator = 0x1e

// parseUserspaceRecord returns false for a measurement that does not go into a PCR.
func parseUserspaceRecord(record []byte) (Event, bool, error) {
	if !bytes.HasSuffix(record, []byte{'\n'}) {
		return Event{}, false, errTruncated
	}
	var r userspaceRecord
	strict, err := json.UnmarshalStrict(record, &r, json.DisallowDuplicateFields)
	if err = errors.Join(append(strict, err)...); err != nil {
		return Event{}, false, err
	}
	switch {
	case (r.PCR == nil) == (r.NVIndex == nil):
		return Event{}, false, errors.New("want either pcr or nv_index")
	case r.PCR == nil, *r.PCR >= NumPCRs:
		return Event{}, false, nil
	}
	e := Event{PCR: int(*r.PCR), UntrustedType: EventTag, UntrustedData: []byte(r.Content.String)}
	for _, d := range r.Digests {
		for _, a := range algorithms {
			if a.name != d.HashAlg {
				continue
			}
			value, err := hex.DecodeString(d.Digest)
			if err != nil || len(value) != a.size {
				return e, false, fmt.Errorf("malformed %s digest", a.name)
			}
			if e.Digest(a.hash) != nil {
				return e, false, fmt.Errorf("two %s digests", a.name)
			}
			e.Digests = append(e.Digests, Digest{a.hash, value})
		}
	}
	if len(e.Digests) == 0 {
		return e, false, errors.New("no digest of a known bank")
	}
	return e, true, nil
}
