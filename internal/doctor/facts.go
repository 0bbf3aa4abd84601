package doctor

import (
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/doctor/credential"
)

// Known is a fact, or the reason why it is not known. If it has neither, the fact does
// not apply to this node.
type Known[T any] struct {
	Value *T
	Why   string
}

// Node holds the facts that the checks examine.
type Node struct {
	Config *config.Config
	// NoConfig says why the configuration can't be read; no other fact is then known.
	NoConfig string
	// ConfigFile is the path of the configuration.
	ConfigFile string
	Status     admin.StatusReport
	// Serving says that the status came from a running serve.
	Serving bool
	// Version is the version of the command.
	Version string
	// EncryptionConfig is the path of kube-apiserver's file; Manifest is the path of its
	// static pod's.
	EncryptionConfig, Manifest string
	Now                        time.Time

	TPM  Known[TPM]
	Boot Known[Boot]
	// Next are the boots of the unified kernel images among [Node.NewBootFiles], by path.
	Next    map[string]Known[Next]
	Process Known[Process]
	Disk    Known[Disk]
	// Synchronised says whether the kernel's clock follows a time server.
	Synchronised Known[bool]
	API          Known[API]
	// Nodes are the nodes of the open keyring; there are none if kleidi is locked.
	Nodes Known[admin.NodeList]
	// Certificate is the client certificate for the cluster store.
	Certificate Known[Certificate]

	// Token is the configured PKCS#11 token. VaultToken is the token in vault.auth.tokenFile.
	Token      Known[credential.Token]
	VaultToken Known[credential.VaultToken]

	// Package is the file name of the package of this variant of kleidi.
	Package string

	// Digests are the events of the firmware's and systemd's logs, for a bundle.
	Digests []Digest

	// Root is prepended to all paths; it is "" except in tests.
	Root string
}

// TPM is the TPM's report about itself.
type TPM struct {
	OwnerAuthSet bool
	InLockout    bool
	// Failed counts the wrong authorizations so far; Most of them lock the TPM.
	Failed, Most uint32
}

// Boot is the evidence of event logs and PCRs about the running boot.
type Boot struct {
	// LogProblem says why the event logs can't be read. Mismatch names the PCRs in which
	// they differ from the TPM.
	LogProblem, Mismatch string
	Type                 string
	// PCRs are those that this node's slots are sealed to. Open lists the parts of the
	// boot that they leave open. Whole are the PCRs that would leave none open, if such
	// PCRs exist.
	PCRs, Whole []int
	Open        []string
	// AtReset are those of the PCRs into which nothing was measured.
	AtReset []int
	// Phase is the present phase of the boot, or "" if nothing measures phases. Restart
	// says why this boot can't happen again.
	Phase, Restart string
}

// Next is the predicted boot of a file.
type Next struct {
	// Moved are the PCRs that differ from the running boot.
	Moved []int
	// Prepared says that a keyslot is sealed to its values.
	Prepared bool
}

// Process is the running serve.
type Process struct {
	PID int
	// Locked is its locked memory in bytes; MaxCore is its limit of core files.
	Locked  uint64
	MaxCore string
	// UID is its user ID.
	UID int
}

// Disk is the file system of the state folder.
type Disk struct {
	Free   uint64  // bytes
	Inodes float64 // free ones, as a share of all
}

// Certificate is a client certificate.
type Certificate struct {
	File string
	Ends time.Time
	// Lives is the time from the start to the end of the certificate.
	Lives time.Duration
	// Problem says why the certificate can't be used, or is not renewed.
	Problem string
}

// API is the report of this node's kube-apiserver.
type API struct {
	// Version is "v1.36.3".
	Version string
	Metrics Known[Metrics]
}

// Metrics are the metrics of kube-apiserver about kleidi.
type Metrics struct {
	// Calls are its calls to kleidi's provider, by gRPC status code.
	Calls map[string]float64
	// Status is the time at which it last saw a key ID of kleidi.
	Status time.Time
	// Invalid counts the key IDs that it refused.
	Invalid float64
	// ConfigHash is the digest of the EncryptionConfiguration in use, or "".
	ConfigHash string
}

// Digest is an event without its data.
type Digest struct {
	PCR    int    `json:"pcr"`
	Type   string `json:"type"`
	Digest string `json:"digest"`
}
