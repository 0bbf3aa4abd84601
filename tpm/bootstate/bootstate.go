package bootstate

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// Limits of a file, for reading and for writing.
const (
	// MaxSize bounds a file, in bytes. MaxStates states of the largest size fit.
	MaxSize = 512 << 10
	// MaxStates bounds the states of a file.
	MaxStates = 256
	// MaxRef bounds a policyRef, in bytes.
	MaxRef = authpolicy.MaxRef
	// MaxWhat bounds a note, in characters.
	MaxWhat = 160
	// maxSignature is the size of a signature by a 4096-bit RSA key, in bytes.
	maxSignature = 512
)

// State is one signed boot state. Until Verify has accepted it, it is a claim.
type State struct {
	// Bank is the PCR bank: crypto.SHA256 or crypto.SHA384.
	Bank crypto.Hash
	// PCRs are the indices of the PCRs, ascending.
	PCRs []int
	// KeyFingerprint identifies the signing key; see the function of that name.
	KeyFingerprint [sha256.Size]byte
	// Digest stands for the PCRs' values: authpolicy.ApprovedDigest, 32 bytes.
	Digest []byte
	// Ref is the policyRef that is signed with Digest, 0 to MaxRef bytes.
	Ref []byte
	// Signature is over SHA-256(Digest ‖ Ref), plainly joined as
	// TPM2_PolicyAuthorize does: RSASSA-PKCS1-v1_5, or ECDSA in ASN.1.
	Signature []byte
	// What is a note for display, at most MaxWhat printable characters. Nothing vouches
	// for it.
	What string
}

// labelRef separates policyRefs from everything else that is hashed for a cluster.
const labelRef = "kleidi boot state ref v1"

// Ref returns the policyRef of a cluster's generation of boot states, 32 bytes: SHA-256
// of the label "kleidi boot state ref v1", the cluster ID and the generation (8 bytes,
// big-endian), each after its length in 8 bytes, big-endian. A slot sealed under this
// policyRef opens for no signature of another cluster or generation, nor for systemd's
// signatures, whose policyRef is empty.
func Ref(clusterID [16]byte, generation uint64) []byte {
	h := sha256.New()
	for _, field := range [][]byte{[]byte(labelRef), clusterID[:], binary.BigEndian.AppendUint64(nil, generation)} {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(field))))
		h.Write(field)
	}
	return h.Sum(nil)
}

// KeyFingerprint returns the fingerprint that identifies a key in a file: SHA-256 of
// the PKCS #1 RSAPublicKey in DER for RSA, of the uncompressed point for ECDSA. systemd
// hashes the same bytes, which OpenSSL's i2d_PublicKey returns; they are not the
// SubjectPublicKeyInfo.
func KeyFingerprint(pub crypto.PublicKey) ([sha256.Size]byte, error) {
	if err := checkKey(pub); err != nil {
		return [sha256.Size]byte{}, err
	}
	if k, ok := pub.(*rsa.PublicKey); ok {
		return sha256.Sum256(x509.MarshalPKCS1PublicKey(k)), nil
	}
	point, err := pub.(*ecdsa.PublicKey).Bytes()
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	return sha256.Sum256(point), nil
}

// lastPCR is the last PCR of a PC's TPM.
const lastPCR = 23

// check refuses a state that a file can't hold.
func (s State) check() error {
	if _, ok := authpolicy.Banks[s.Bank]; !ok {
		return fmt.Errorf("PCR bank %v; want SHA-256 or SHA-384", s.Bank)
	}
	if len(s.PCRs) == 0 {
		return fmt.Errorf("pcrs names no PCR")
	}
	for i, p := range s.PCRs {
		if p < 0 || p > lastPCR {
			return fmt.Errorf("pcrs names PCR %d; want 0 to %d", p, lastPCR)
		}
		if i > 0 && s.PCRs[i-1] >= p {
			return fmt.Errorf("pcrs names PCR %d twice or out of order", p)
		}
	}
	switch {
	case len(s.Digest) != sha256.Size:
		return fmt.Errorf("pol has %d bytes, want %d", len(s.Digest), sha256.Size)
	case len(s.Signature) == 0:
		return fmt.Errorf("sig is missing: this boot state is not signed; sign it with kleidi bootstate sign --key FILE --cluster-id ID --event-log FILE, or with systemd-measure sign")
	case len(s.Signature) > maxSignature:
		return fmt.Errorf("sig has %d bytes, want at most %d", len(s.Signature), maxSignature)
	case len(s.Ref) > MaxRef:
		return fmt.Errorf("ref has %d bytes, want at most %d", len(s.Ref), MaxRef)
	}
	return checkWhat(s.What)
}

func checkWhat(what string) error {
	if n := utf8.RuneCountInString(what); n > MaxWhat {
		return fmt.Errorf("what has %d characters, want at most %d", n, MaxWhat)
	}
	if !utf8.ValidString(what) || strings.ContainsFunc(what, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Errorf("what holds characters that can't be shown; use letters, digits, punctuation and spaces")
	}
	return nil
}

// equal reports whether two states are the same, notes aside.
func (s State) equal(o State) bool {
	return s.Bank == o.Bank && slices.Equal(s.PCRs, o.PCRs) && s.KeyFingerprint == o.KeyFingerprint &&
		bytes.Equal(s.Digest, o.Digest) && bytes.Equal(s.Ref, o.Ref) && bytes.Equal(s.Signature, o.Signature)
}

// String describes the state for display: its PCRs, its note and the start of its
// digest.
func (s State) String() string {
	name := fmt.Sprintf("%s PCR %s, pol %s", bankName(s.Bank), strings.Trim(strings.ReplaceAll(fmt.Sprint(s.PCRs), " ", "+"), "[]"),
		hex.EncodeToString(s.Digest[:min(8, len(s.Digest))]))
	if s.What != "" {
		name += fmt.Sprintf(" (%s)", s.What)
	}
	return name
}

func bankName(bank crypto.Hash) string {
	for _, b := range banks {
		if b.bank == bank {
			return b.name
		}
	}
	return bank.String()
}

// banks are the banks that are read and written, in the order of writing.
var banks = []struct {
	name string
	bank crypto.Hash
}{{"sha256", crypto.SHA256}, {"sha384", crypto.SHA384}}
