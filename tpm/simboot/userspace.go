package simboot

import (
	"crypto"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// record is one record of systemd's tpm2-measure.log (systemd,
// src/shared/tpm2-util.c, tpm2_userspace_log).
type record struct {
	PCR         int            `json:"pcr"`
	Digests     []recordDigest `json:"digests"`
	ContentType string         `json:"content_type"`
	Content     recordContent  `json:"content"`
}

type recordDigest struct {
	HashAlg string `json:"hashAlg"`
	Digest  string `json:"digest"`
}

type recordContent struct {
	String    string `json:"string"`
	BootID    string `json:"bootId"`
	Timestamp uint64 `json:"timestamp"` // µs since the boot
	EventType string `json:"eventType"`
}

var hashNames = map[crypto.Hash]string{
	crypto.SHA1: "sha1", crypto.SHA256: "sha256", crypto.SHA384: "sha384", crypto.SHA512: "sha512",
	crypto.SHA3_256: "sha3-256", crypto.SHA3_384: "sha3-384", crypto.SHA3_512: "sha3-512",
}

// userspace returns the measurements of systemd-pcrphase, and their log: JSON records
// between RS and LF (RFC 7464).
func userspace(b Boot, banks []crypto.Hash) ([]eventlog.Event, []byte, error) {
	if b.Phases == "" {
		return nil, nil, nil
	}
	var events []eventlog.Event
	var log []byte
	for i, phase := range strings.Split(b.Phases, ":") {
		e := eventlog.Measure(banks, 11, eventlog.IPL, []byte(phase), []byte(phase))
		r := record{PCR: e.PCR, ContentType: "systemd", Content: recordContent{
			String:    phase,
			BootID:    hex.EncodeToString(content("boot id")[:16]),
			Timestamp: uint64(i+1) * 1_000_000,
			EventType: "phase",
		}}
		for _, d := range e.Digests {
			r.Digests = append(r.Digests, recordDigest{hashNames[d.Hash], hex.EncodeToString(d.Value)})
		}
		line, err := json.Marshal(r)
		if err != nil {
			return nil, nil, fmt.Errorf("userspace log: %w", err)
		}
		log = append(append(append(log, 0x1e), line...), '\n')
		events = append(events, e)
	}
	return events, log, nil
}
