package main

import (
	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
)

// The results of verbs that no package below has a type for, as -o json prints them.

// shownKeyring is the stored keyring.
type shownKeyring struct {
	keyring.Info
	Slots []seal.Slot `json:"slots"`
}

// backedUpKeyring is the copy that was made.
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
	// File is where it was written, if it was.
	File       string `json:"file,omitempty"`
	Bank       string `json:"bank"`
	SecureBoot string `json:"secureBoot,omitempty"`
	// PCRs are those that it demands, and YAML is the whole of it.
	PCRs []int  `json:"pcrs"`
	YAML string `json:"yaml"`
}

func showPolicy(p *bootpolicy.BootPolicy, file string) shownPolicy {
	return shownPolicy{File: file, Bank: p.Bank, SecureBoot: string(p.SecureBoot), PCRs: p.Demanded(), YAML: string(p.Marshal())}
}

// policyDiff is what one boot policy demands otherwise than another.
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

// shownVersion is this program.
type shownVersion struct {
	Version string `json:"version"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
	PKCS11  bool   `json:"pkcs11"`
	// FIPS140 is the version of Go's FIPS 140-3 module, if its mode is on.
	FIPS140 string `json:"fips140,omitempty"`
}

// exportedKeyring is the file that was written.
type exportedKeyring struct {
	File     string     `json:"file"`
	KeyID    seal.KeyID `json:"keyID"`
	Revision uint64     `json:"revision"`
}
