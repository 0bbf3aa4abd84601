package slowtpm

import (
	"encoding/binary"

	"github.com/google/go-tpm/tpm2"
)

// Kind is a kind of command. The kinds differ by the work that makes a command slow.
type Kind string

// The kinds.
const (
	// Curve commands make an elliptic-curve key, or multiply or sign with one.
	Curve Kind = "elliptic curve"
	// RSA commands make an RSA key or decrypt with one.
	RSA Kind = "RSA"
	// Write commands write NV memory.
	Write Kind = "NV write"
	// Other commands hash, encrypt and look up.
	Other Kind = "other"
)

var byCode = map[tpm2.TPMCC]Kind{
	tpm2.TPMCCQuote: Curve, tpm2.TPMCCCertify: Curve, tpm2.TPMCCCertifyCreation: Curve, tpm2.TPMCCSign: Curve, tpm2.TPMCCImport: Curve,
	tpm2.TPMCCVerifySignature: Curve, tpm2.TPMCCPolicySigned: Curve, tpm2.TPMCCECDHZGen: Curve, tpm2.TPMCCECDHKeyGen: Curve,
	tpm2.TPMCCActivateCredential: RSA, tpm2.TPMCCRSADecrypt: RSA,
	tpm2.TPMCCNVDefineSpace: Write, tpm2.TPMCCNVUndefineSpace: Write, tpm2.TPMCCNVIncrement: Write, tpm2.TPMCCNVWrite: Write,
}

// KindOf returns the kind of a command. If the command does not show its key, KindOf
// assumes an elliptic-curve key, like kleidi's own keys, except for commands on the
// endorsement key.
func KindOf(command []byte) Kind {
	if len(command) < headerSize {
		return Other
	}
	code := tpm2.TPMCC(binary.BigEndian.Uint32(command[6:]))
	body := command[headerSize:]
	switch code {
	case tpm2.TPMCCCreatePrimary, tpm2.TPMCCCreate, tpm2.TPMCCCreateLoaded:
		return kindOfNew(body)
	case tpm2.TPMCCStartAuthSession: // the salt is encrypted to the key of the first handle
		if len(body) >= 4 && tpm2.TPMHandle(binary.BigEndian.Uint32(body)) != tpm2.TPMRHNull {
			return Curve
		}
		return Other
	}
	if kind, ok := byCode[code]; ok {
		return kind
	}
	return Other
}

// kindOfNew reads the type of the new key. The type follows the parent's handle, the
// authorizations and the sensitive part, each with its size in front (TPM 2.0 Library,
// Part 3, 12.1).
func kindOfNew(body []byte) Kind {
	rest, ok := skip(body, 4, 0)
	if ok {
		rest, ok = skip(rest, 0, 4)
	}
	if ok {
		rest, ok = skip(rest, 0, 2)
	}
	if !ok || len(rest) < 4 {
		return Other
	}
	switch tpm2.TPMAlgID(binary.BigEndian.Uint16(rest[2:])) {
	case tpm2.TPMAlgECC:
		return Curve
	case tpm2.TPMAlgRSA:
		return RSA
	}
	return Other
}

// skip drops n bytes and the field after them, whose length is in its first size bytes.
func skip(b []byte, n, size int) (rest []byte, ok bool) {
	if len(b) < n+size {
		return nil, false
	}
	b = b[n:]
	var length int
	for _, x := range b[:size] {
		length = length<<8 | int(x)
	}
	if len(b) < size+length {
		return nil, false
	}
	return b[size+length:], true
}

const headerSize = 10
