package bootpolicy

import (
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Record returns the boot policy that demands exactly this boot: the digests of the given
// PCRs in their order, the state of Secure Boot, and the firmware's version, as far as the
// log proves them. Record from a log that was verified against a quote, because a log alone
// may claim anything.
//
// Record refuses a boot that Judge would not accept, such as a boot in which the firmware
// reports an error.
func Record(log *eventlog.Log, bank crypto.Hash, pcrs []int) (*BootPolicy, error) {
	p := &BootPolicy{APIVersion: APIVersion, Kind: Kind, Bank: eventlog.BankName(bank), PCRs: map[int]Rule{}}
	if p.Hash() == 0 {
		return nil, fmt.Errorf("boot policy: bank %s; choose sha256 or sha384", p.Bank)
	}
	for _, pcr := range pcrs {
		p.PCRs[pcr] = Rule{Sequences: [][]Entry{{}}}
	}
	claimed, err := p.Claimed(log)
	if err != nil {
		return nil, fmt.Errorf("boot policy: %w", err)
	}
	j := &judgement{Verdict: &Verdict{}, policy: p, events: map[int][]event{}}
	j.collect(log)
	for _, pcr := range p.Demanded() {
		p.PCRs[pcr] = recordRule(pcr, j.events[pcr])
	}
	if _, ok := p.PCRs[0]; ok {
		p.recordFirmware(j)
	}
	if slices.Contains(pcrs, 7) {
		p.SecureBoot = recordedAs(j.log.SecureBootState())
	}
	if v := Judge(p, log, claimed); !v.Accepted {
		return nil, fmt.Errorf("boot policy: this boot can't be recorded: %s", v.Findings[0])
	}
	if n := len(p.Marshal()); n > MaxSize {
		return nil, fmt.Errorf("boot policy: it would have %d bytes, more than %d; leave the PCR with the most events out", n, MaxSize)
	}
	return p, nil
}

// recordRule lists the events of a PCR. It demands no separator if the firmware measured
// none, or if another event has the bytes of one: the boot order 0001, 0000 has the bytes of
// a separator that reports an error, and some firmware measures four zeros into PCR 0. The
// list still holds these events.
func recordRule(pcr int, events []event) Rule {
	list := make([]Entry, 0, len(events))
	separated, alike := false, false
	for _, e := range events {
		list = append(list, Entry{FormDigest, hex.EncodeToString(e.digest), describe(e)})
		if e.UntrustedType == eventlog.Separator {
			separated = true
		} else if separatorOf(e.Event) != noSeparator {
			alike = true
		}
	}
	r := Rule{Sequences: [][]Entry{list}}
	if no := false; pcr <= lastSeparated && (!separated || alike) {
		r.Separator = &no
	}
	return r
}

// describe returns an event's note. The note of an authority contains the digest of its
// certificate, so that a person can replace the entry by a certificate entry.
func describe(e event) string {
	suffix := ""
	if c := authority(e.Event); c != nil {
		suffix = fmt.Sprintf("; certificate %x", sum(crypto.SHA256, c))
	}
	return note(printable(e.what(), maxNote-len(suffix)) + suffix)
}

func (p *BootPolicy) recordFirmware(j *judgement) {
	if locality, err := j.log.StartupLocality(); err == nil {
		l := int(locality)
		p.Firmware.StartupLocality = &l
	}
	for _, e := range j.events[0] {
		if separatorOf(e.Event) != noSeparator {
			return
		}
		if e.UntrustedType != eventlog.CRTMVersion {
			continue
		}
		v, ok := provenText(e)
		if !ok { // a version that is not text, such as a GUID, can't be written in the file
			p.Firmware.Versions = nil
			return
		}
		if !slices.Contains(p.Firmware.Versions, v) {
			p.Firmware.Versions = append(p.Firmware.Versions, v)
		}
	}
}

// provenText returns the text of an event if measuring this text gives the digest.
func provenText(e event) (string, bool) {
	data := e.UntrustedData
	if len(data) > 2*maxText {
		return "", false
	}
	units := make([]uint16, len(data)/2)
	for i := range units {
		units[i] = binary.LittleEndian.Uint16(data[2*i:])
	}
	for _, s := range []string{string(data), string(utf16.Decode(units))} {
		s = strings.TrimRight(s, "\x00")
		if !utf8.ValidString(s) || len(s) > maxText || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) {
			continue
		}
		for _, measured := range encodings(s) {
			if e.Proves(measured) {
				return s, true
			}
		}
	}
	return "", false
}
