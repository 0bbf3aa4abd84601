package main

import (
	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
)

// Results of verbs without a type in the packages below, as -o json prints them.

// shownKeyring is the stored keyring.
type shownKeyring struct {
	keyring.Info
	Slots []seal.Slot `json:"slots"`
}

// writtenArchive is the result of keyring archive.
type writtenArchive struct {
	File       string     `json:"file"`
	KeyID      seal.KeyID `json:"keyID"`
	Recipients []string   `json:"recipients"`
}

// backedUpKeyring is the copy of the keyring.
type backedUpKeyring struct {
	File     string     `json:"file"`
	KeyID    seal.KeyID `json:"keyID"`
	Revision uint64     `json:"revision"`
}

// checkedKeyring says which snapshots a keyring opens.
type checkedKeyring struct {
	Snapshots []usage.Opening `json:"snapshots"`
}

// shownPolicy is a boot policy.
type shownPolicy struct {
	// File is the path to which the boot policy was written, if it was.
	File       string `json:"file,omitempty"`
	Bank       string `json:"bank"`
	SecureBoot string `json:"secureBoot,omitempty"`
	// PCRs are the PCRs that the boot policy demands, and YAML is the whole boot policy.
	PCRs []int  `json:"pcrs"`
	YAML string `json:"yaml"`
}

func showPolicy(p *bootpolicy.BootPolicy, file string) shownPolicy {
	return shownPolicy{File: file, Bank: p.Bank, SecureBoot: string(p.SecureBoot), PCRs: p.Demanded(), YAML: string(p.Marshal())}
}

// policyDiff lists how the demands of one boot policy differ from another's.
type policyDiff struct {
	Changes []bootpolicy.Change `json:"changes"`
}

// shownLog is an event log, event by event.
type shownLog struct {
	Bank   string           `json:"bank"`
	Events []bootpolicy.Row `json:"events"`
}

// signedState is a boot state that was signed.
type signedState struct {
	File string `json:"file"`
	Bank string `json:"bank"`
	PCRs []int  `json:"pcrs"`
	// Key is the fingerprint of the key that signed it.
	Key string `json:"key"`
}

// savedEvidence is a quote with its event log.
type savedEvidence struct {
	File  string `json:"file"`
	Bank  string `json:"bank"`
	PCRs  []int  `json:"pcrs"`
	Nonce string `json:"nonce"`
	// AttestationKey is the digest of the key that signed the quote.
	AttestationKey string `json:"attestationKey"`
}

// shownVersion describes this program.
type shownVersion struct {
	Version string `json:"version"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
	PKCS11  bool   `json:"pkcs11"`
	// FIPS140 is the version of Go's FIPS 140-3 module, if FIPS mode is on.
	FIPS140 string `json:"fips140,omitempty"`
}

// exportedKeyring is the file that was written.
type exportedKeyring struct {
	File     string     `json:"file"`
	KeyID    seal.KeyID `json:"keyID"`
	Revision uint64     `json:"revision"`
}
