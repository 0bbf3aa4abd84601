package main

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// banks are the judged or quoted banks, with their TPM_ALG_ID and systemd's name for
// them.
var banks = map[uint16]bank{0x0b: {crypto.SHA256, "sha256"}, 0x0c: {crypto.SHA384, "sha384"}}

type bank struct {
	hash crypto.Hash
	name string
}

// measured holds the digests that, according to a log, were extended into each PCR, in
// order, and the initial locality of PCR 0. This separate reader shares no line with the
// parser that the oracle judges. It is not strict: it reads as much as it can.
type measured struct {
	digests  map[int][][]byte
	locality byte
}

func read(hash crypto.Hash, firmware, userspace []byte) measured {
	m := measured{digests: map[int][][]byte{}}
	m.firmware(hash, firmware)
	m.userspace(hash, userspace)
	return m
}

// cursor takes little-endian fields off a log, and zeros after its end.
type cursor struct {
	rest []byte
	over bool
}

func (c *cursor) take(n int) []byte {
	if n < 0 || n > len(c.rest) {
		c.over, c.rest = true, nil
		return nil
	}
	b := c.rest[:n]
	c.rest = c.rest[n:]
	return b
}

func (c *cursor) number(bytes int) int {
	b := make([]byte, 8)
	copy(b, c.take(bytes))
	return int(binary.LittleEndian.Uint64(b))
}

func (m *measured) firmware(hash crypto.Hash, raw []byte) {
	c := &cursor{rest: raw}
	c.take(28)
	head := &cursor{rest: c.take(c.number(4))}
	head.take(24)
	sizes := map[int]int{}
	for range min(head.number(4), 16) {
		id := head.number(2)
		sizes[id] = head.number(2)
	}
	for len(c.rest) > 0 && !c.over {
		pcr, typ := c.number(4), c.number(4)
		var digest []byte
		for range min(c.number(4), 16) {
			id := c.number(2)
			value := c.take(sizes[id])
			if banks[uint16(id)].hash == hash {
				digest = value
			}
		}
		data := c.take(c.number(4))
		switch {
		case c.over:
		case typ != int(eventlog.NoAction):
			m.digests[pcr] = append(m.digests[pcr], digest)
		case pcr == 0 && len(data) >= 17 && bytes.HasPrefix(data, []byte("StartupLocality\x00")):
			m.locality = data[16]
		}
	}
}

func (m *measured) userspace(hash crypto.Hash, raw []byte) {
	for _, text := range bytes.Split(raw, []byte{0x1e}) {
		var fields map[string]json.RawMessage // names match exactly, unlike in a struct
		var pcr int
		var digests []map[string]string
		if json.Unmarshal(text, &fields) != nil || json.Unmarshal(fields["pcr"], &pcr) != nil || json.Unmarshal(fields["digests"], &digests) != nil {
			continue
		}
		for _, d := range digests {
			value, err := hex.DecodeString(d["digest"])
			if err == nil && d["hashAlg"] == name(hash) {
				m.digests[pcr] = append(m.digests[pcr], value)
			}
		}
	}
}

func name(hash crypto.Hash) string {
	for _, b := range banks {
		if b.hash == hash {
			return b.name
		}
	}
	return ""
}

// values returns the values of a TPM after these measurements.
func (m measured) values(hash crypto.Hash, pcrs []int) map[int][]byte {
	values := map[int][]byte{}
	for _, pcr := range pcrs {
		v := make([]byte, hash.Size())
		if pcr == 0 {
			v[len(v)-1] = m.locality
		}
		for _, d := range m.digests[pcr] {
			h := hash.New()
			h.Write(v)
			h.Write(d)
			v = h.Sum(nil)
		}
		values[pcr] = v
	}
	return values
}

// same compares the digests of these PCRs.
func (m measured) same(other measured, pcrs []int) bool {
	for _, pcr := range pcrs {
		if !slices.EqualFunc(m.digests[pcr], other.digests[pcr], bytes.Equal) {
			return false
		}
	}
	return true
}
