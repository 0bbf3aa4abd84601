package keyring

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Limits of records.
const (
	// MaxRecordSize bounds a whole record, in bytes.
	MaxRecordSize = 64 << 10
	// MaxText bounds each of a record's texts, in bytes.
	MaxText = 512
	// MaxPCRs bounds the PCRs of a boot state: a TPM has 24.
	MaxPCRs = 24
	// MaxKeyArea bounds the public area of a signer's or verifier's key, in bytes; an
	// RSA key of 4096 bits fits.
	MaxKeyArea = 640
	// MaxRef bounds a policyRef, in bytes.
	MaxRef = 32
)

const recordFormat1 = 1

// Record is a node's report about itself in the cluster store: the keyring that it
// trusts, the key ID that it announces, the KEK that it has acknowledged, and the boot
// states for which a KEK must be wrapped.
type Record struct {
	Node string
	// Formats are the keyring formats that the node's binary reads, ascending.
	Formats []int
	// Version is the version of that binary, for display.
	Version string
	// Revision is the revision of the shared keyring in the node's file.
	Revision uint64
	// Anchored is the key ID in the node's anchor.
	Anchored seal.KeyID
	// Announced is the key ID that the node tells kube-apiserver.
	Announced seal.KeyID
	// Encrypted is the key ID of the last Encrypt, or of a KEK under which another
	// connection still encrypts; "" means no Encrypt since the start.
	Encrypted seal.KeyID
	// Acknowledged is the key ID of the staged KEK that the node has opened, sealed for
	// each of its boot states and saved; "" means none.
	Acknowledged seal.KeyID
	BootStates   []RecordedState
	// Problem describes the fault of the node, for display; "" means none.
	Problem string
	// Started is the time of serve's last start on the node, for display. No decision
	// reads it.
	Started time.Time
}

// RecordedState is one way in which a node boots, in the terms of its TPM slots.
// Package tpm defines the meaning of the members.
type RecordedState struct {
	Bank     string            `json:"bank"` // sha256 or sha384
	PCRs     map[string]string `json:"pcrs"` // hexadecimal values by PCR
	Use      string            `json:"use,omitempty"`
	Resets   uint32            `json:"resets,omitempty"`   // the last resetCount of a suspension
	Signer   *RecordedKey      `json:"signer,omitempty"`   // signs the other PCRs
	Verifier *RecordedKey      `json:"verifier,omitempty"` // must agree each time
	AtMost   uint64            `json:"atMost"`             // the last epoch
	Second   string            `json:"second,omitempty"`   // the other wrapper that must open, too
}

// RecordedKey is a public key that an authorization policy names.
type RecordedKey struct {
	Key []byte `json:"key"` // TPMT_PUBLIC
	Ref []byte `json:"ref"` // policyRef
}

// record1 is a record of format 1. Members stand in this order.
type record1 struct {
	Format       int             `json:"format"`
	ClusterID    seal.ClusterID  `json:"clusterID"`
	Node         string          `json:"node"`
	KeyID        seal.KeyID      `json:"keyID"` // key ID of the KEK whose MAC covers the record
	Formats      []int           `json:"formats"`
	Version      string          `json:"version"`
	Revision     uint64          `json:"revision"`
	Anchored     seal.KeyID      `json:"anchored"`
	Announced    seal.KeyID      `json:"announced"`
	Encrypted    seal.KeyID      `json:"encrypted,omitempty"`
	Acknowledged seal.KeyID      `json:"acknowledged,omitempty"`
	Proof        []byte          `json:"proof,omitempty"`
	BootStates   []RecordedState `json:"bootStates,omitempty"`
	Problem      string          `json:"problem,omitempty"`
	Started      stamp           `json:"started"`
}

// recordEnvelope is the stored document.
type recordEnvelope struct {
	Record []byte `json:"record"`
	MAC    []byte `json:"mac"`
}

// UntrustedRecord is a record that parses. Nothing in it is authenticated: an attacker
// who can write to the cluster store may have chosen all of its content.
type UntrustedRecord struct {
	raw []byte // the record as stored; the MAC covers it
	mac []byte
	doc *record1
}

// VerifiedRecord is a record that a node of the cluster wrote.
type VerifiedRecord struct {
	Record
	// KeyID is the key ID of the KEK whose MAC covers the record: the KEK that was
	// current on that node. Any holder of that KEK can have written the record.
	KeyID seal.KeyID
	// Proven says that the node holds the staged KEK, which is the acknowledged one.
	Proven bool
}

// ParseRecord reads a record. It accepts only the one encoding that
// [Keyring.SignRecord] writes, within the limits of the format.
func ParseRecord(b []byte) (*UntrustedRecord, error) {
	u, err := parseRecord(b)
	if err != nil {
		return nil, fmt.Errorf("parse record: %w", err)
	}
	return u, nil
}

func parseRecord(b []byte) (*UntrustedRecord, error) {
	if len(b) > MaxRecordSize {
		return nil, fmt.Errorf("more than %d bytes", MaxRecordSize)
	}
	file, ended := bytes.CutSuffix(b, []byte("\n"))
	if !ended {
		return nil, errors.New("truncated: no newline at the end")
	}
	var e recordEnvelope
	if err := decode(file, &e); err != nil {
		return nil, err
	}
	if len(e.MAC) != sha256.Size {
		return nil, fmt.Errorf("mac has %d bytes, want %d", len(e.MAC), sha256.Size)
	}
	r := new(record1)
	if err := decode(e.Record, r); err != nil {
		return nil, err
	}
	return &UntrustedRecord{raw: e.Record, mac: e.MAC, doc: r}, r.check()
}

func (r *record1) check() error {
	switch {
	case r.Format != recordFormat1:
		return fmt.Errorf("format is %d, want %d", r.Format, recordFormat1)
	case !nodeName.MatchString(r.Node):
		return errors.New("malformed node name")
	case !validKeyID(r.KeyID) || !validKeyID(r.Anchored) || !validKeyID(r.Announced):
		return errors.New("malformed key ID")
	case r.Encrypted != "" && !validKeyID(r.Encrypted) || r.Acknowledged != "" && !validKeyID(r.Acknowledged):
		return errors.New("malformed key ID")
	case (r.Acknowledged == "") != (r.Proof == nil) || r.Proof != nil && len(r.Proof) != sha256.Size:
		return fmt.Errorf("an acknowledged key ID and a proof of %d bytes belong together", sha256.Size)
	case r.Revision == 0 || r.Revision > MaxRevision:
		return fmt.Errorf("revision %d is not between 1 and %d", r.Revision, uint64(MaxRevision))
	case !printable(r.Version) || !printable(r.Problem):
		return fmt.Errorf("a text is longer than %d bytes, or not in one line of printable characters", MaxText)
	case len(r.BootStates) > MaxSlots:
		return fmt.Errorf("%d boot states, at most %d", len(r.BootStates), MaxSlots)
	}
	if err := checkFormats(r.Formats); err != nil {
		return err
	}
	for i, s := range r.BootStates {
		if err := s.check(); err != nil {
			return fmt.Errorf("bootStates[%d]: %w", i, err)
		}
	}
	return nil
}

func printable(s string) bool { return len(s) <= MaxText && seal.OneLine(s, MaxText) == s }

// maxFormats bounds the formats that one binary reads.
const maxFormats = 16

func checkFormats(formats []int) error {
	if len(formats) == 0 || len(formats) > maxFormats {
		return fmt.Errorf("%d formats, want 1 to %d", len(formats), maxFormats)
	}
	last := 0
	for _, f := range formats {
		if f <= last {
			return errors.New("formats are not positive and ascending")
		}
		last = f
	}
	return nil
}

func (s *RecordedState) check() error {
	size := map[string]int{"sha256": 32, "sha384": 48}[s.Bank]
	if size == 0 {
		return fmt.Errorf("bank %.64q; want sha256 or sha384", s.Bank)
	}
	if len(s.PCRs) == 0 || len(s.PCRs) > MaxPCRs {
		return fmt.Errorf("%d PCRs, want 1 to %d", len(s.PCRs), MaxPCRs)
	}
	for name, value := range s.PCRs {
		n, err := strconv.Atoi(name)
		if err != nil || n < 0 || n >= MaxPCRs || strconv.Itoa(n) != name {
			return fmt.Errorf("PCR %.64q does not exist", name)
		}
		if b, err := hex.DecodeString(value); err != nil || len(b) != size || hex.EncodeToString(b) != value {
			return fmt.Errorf("PCR %d is not %d lower-case hexadecimal digits", n, 2*size)
		}
	}
	if s.Use != "" && !slotType.MatchString(s.Use) {
		return errors.New("malformed use")
	}
	if s.Second != "" && !slotType.MatchString(s.Second) {
		return errors.New("malformed second wrapper")
	}
	for what, k := range map[string]*RecordedKey{"signer": s.Signer, "verifier": s.Verifier} {
		if k != nil && (len(k.Key) == 0 || len(k.Key) > MaxKeyArea || len(k.Ref) > MaxRef) {
			return fmt.Errorf("%s: a key of %d bytes and a ref of %d", what, len(k.Key), len(k.Ref))
		}
	}
	return nil
}

// Node returns the node that the record claims to describe.
func (u *UntrustedRecord) Node() string { return u.doc.Node }

// Claims returns what the record claims. Nothing in it is authenticated.
func (u *UntrustedRecord) Claims() Record { return u.doc.record() }

func (r *record1) record() Record {
	return Record{Node: r.Node, Formats: r.Formats, Version: r.Version, Revision: r.Revision, Anchored: r.Anchored, Announced: r.Announced,
		Encrypted: r.Encrypted, Acknowledged: r.Acknowledged, BootStates: r.BootStates, Problem: r.Problem, Started: r.Started.Time}
}

// SignRecord returns a record for storage, with a MAC under the current KEK. If the
// record acknowledges the staged KEK, which must be open, it contains the proof.
func (k *Keyring) SignRecord(r Record) ([]byte, error) {
	doc := record1{Format: recordFormat1, ClusterID: k.ClusterID(), Node: r.Node, KeyID: k.CurrentID(), Formats: r.Formats, Version: r.Version, Revision: r.Revision,
		Anchored: r.Anchored, Announced: r.Announced, Encrypted: r.Encrypted, Acknowledged: r.Acknowledged, BootStates: r.BootStates, Problem: r.Problem, Started: newStamp(r.Started)}
	if r.Acknowledged != "" && !withHeld(k, r.Acknowledged, func(kek []byte) { doc.Proof = acknowledgement(kek, doc.ClusterID, doc.Node, doc.Acknowledged) }) {
		return nil, fmt.Errorf("sign record: the acknowledged KEK %s is not open", r.Acknowledged)
	}
	b, err := encode(&doc)
	if err != nil {
		return nil, fmt.Errorf("sign record: %w", err)
	}
	e := recordEnvelope{Record: b}
	if !withKEK(k.kek.secret, func(kek []byte) { e.MAC = recordMAC(kek, b) }) {
		return nil, fmt.Errorf("sign record: %w", ErrClosed)
	}
	file, err := encode(e)
	if err != nil {
		return nil, fmt.Errorf("sign record: %w", err)
	}
	file = append(file, '\n')
	if _, err := parseRecord(file); err != nil { // never write a record that nobody can read
		return nil, fmt.Errorf("sign record: %w", err)
	}
	return file, nil
}

// Verify accepts a record only if, in this order:
//
//  1. the record's cluster is that of k, and the node is one of k's;
//  2. the MAC verifies under a KEK that k holds;
//  3. if k holds the acknowledged KEK, the proof verifies under it.
//
// If k does not hold the acknowledged KEK open, the record acknowledges nothing. An error
// has no cause: the record counts as missing.
func (u *UntrustedRecord) Verify(k *Keyring) (*VerifiedRecord, error) {
	d := u.doc
	switch {
	case d.ClusterID != k.ClusterID():
		return nil, fmt.Errorf("the record of node %q is of cluster %s", d.Node, d.ClusterID)
	case k.doc.node(d.Node) == nil:
		return nil, fmt.Errorf("there is a record of node %q, which is not in the keyring", d.Node)
	}
	verified := false
	held := withHeld(k, d.KeyID, func(kek []byte) { verified = hmac.Equal(recordMAC(kek, u.raw), u.mac) })
	if !held || !verified {
		return nil, fmt.Errorf("the MAC of node %q's record does not verify under key ID %s", d.Node, d.KeyID)
	}
	v := &VerifiedRecord{KeyID: d.KeyID, Record: d.record()}
	held = withHeld(k, d.Acknowledged, func(kek []byte) {
		v.Proven = hmac.Equal(acknowledgement(kek, d.ClusterID, d.Node, d.Acknowledged), d.Proof)
	})
	if held && !v.Proven {
		return nil, fmt.Errorf("node %q's record does not prove that it holds the KEK %s that it acknowledges", d.Node, d.Acknowledged)
	}
	return v, nil
}

func recordMAC(kek, record []byte) (sum []byte) {
	derive(kek, labelRecord, func(key []byte) { sum = mac(key, record) })
	return sum
}

// acknowledgement proves that a node holds a staged KEK. It differs from the record's
// MAC, which is under the current KEK: a removed node knows the current KEK.
func acknowledgement(kek []byte, cluster seal.ClusterID, node string, id seal.KeyID) (sum []byte) {
	derive(kek, labelAcknowledged, func(key []byte) { sum = mac(key, frame(string(cluster[:]), node, string(id))) })
	return sum
}
