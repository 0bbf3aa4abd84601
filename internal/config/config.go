// Package config reads kleidi's configuration file, strictly: it refuses an unknown
// key, a wrong type or a value out of range, and reports all problems at once. A node
// with a TPM needs no configuration file at all.
package config

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strconv"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/kmsplugin"
	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/vault"
)

// APIVersion and Kind begin every configuration file.
const (
	APIVersion = "kleidi.beezy.dev/v1alpha1"
	Kind       = "KleidiConfiguration"
)

// DefaultPath is read if it exists and no other file is named.
const DefaultPath = "/etc/kleidi/config.yaml"

// Config is the configuration file.
type Config struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string `yaml:"kind"`
	// Node is this machine's name in the keyring; the host name if empty.
	Node      string    `yaml:"node"`
	State     State     `yaml:"state"`
	TPM       TPM       `yaml:"tpm"`
	Anchor    Anchor    `yaml:"anchor"`
	Unlock    Unlock    `yaml:"unlock"`
	PKCS11    PKCS11    `yaml:"pkcs11"`
	Vault     Vault     `yaml:"vault"`
	KMSPlugin KMSPlugin `yaml:"kmsPlugin"`
	Memory    Memory    `yaml:"memory"`
	KMS       KMS       `yaml:"kms"`
	Admin     Admin     `yaml:"admin"`
	HTTP      HTTP      `yaml:"http"`
	Join      Join      `yaml:"join"`
	// Cluster is the store that all nodes share.
	Cluster Cluster `yaml:"cluster"`
	Audit   Audit   `yaml:"audit"`
	Log     Log     `yaml:"log"`
}

// State says where the keyring and the anchor are kept.
type State struct {
	Dir string `yaml:"dir"`
}

// TPM says which TPM to use, and what to seal to.
type TPM struct {
	Device            string        `yaml:"device"`
	Timeout           time.Duration `yaml:"timeout"`
	OwnerAuthFile     string        `yaml:"ownerAuthFile"`
	Bank              string        `yaml:"bank"`
	PCRs              []int         `yaml:"pcrs"`
	AnySignedBoot     bool          `yaml:"anySignedBoot"`
	EpochIndex        uint32        `yaml:"epochIndex"`
	EventLog          string        `yaml:"eventLog"`
	UserspaceEventLog string        `yaml:"userspaceEventLog"`
	Verifier          Verifier      `yaml:"verifier"`
	// BootPolicy is the file of the boot policy; "" means no boot policy.
	BootPolicy string `yaml:"bootPolicy"`
	// BootStates are files of signed boot states, in addition to the added ones.
	BootStates []string `yaml:"bootStates"`
	// Phase is the phase of the boot in which slots are made.
	Phase string `yaml:"phase"`
}

// Verifier is a machine that must agree each time before a slot opens. Without an
// address there is no verifier.
type Verifier struct {
	Address     string        `yaml:"address"`
	Certificate string        `yaml:"certificate"`
	CAFile      string        `yaml:"caFile"`
	ServerName  string        `yaml:"serverName"`
	PublicKey   string        `yaml:"publicKey"`
	Timeout     time.Duration `yaml:"timeout"`
}

// Anchor says where the node keeps its anchor, the state that it last trusted.
type Anchor struct {
	Store string `yaml:"store"`
	Index uint32 `yaml:"index"`
	PCRs  []int  `yaml:"pcrs"`
}

// The values of anchor.store.
const (
	AnchorFile = "file"
	AnchorTPM  = "tpm"
)

// Unlock says which wrappers may open the keyring.
type Unlock struct {
	// Order names wrappers: tpm, pkcs11, vault and kms-plugin; or one two-of-two, such as
	// tpm-and-pkcs11.
	Order []string `yaml:"order"`
	// RequireAttestation demands that the gate passes before any wrapper is tried.
	RequireAttestation bool `yaml:"requireAttestation"`
	// SelfTest is how often the slots of wrappers other than the TPM are opened as a
	// test.
	SelfTest time.Duration `yaml:"selfTest"`
}

// PKCS11 is a key in a PKCS#11 token; see Configured.
type PKCS11 struct {
	Module   string `yaml:"module"`
	InitArgs string `yaml:"initArgs"`
	URI      string `yaml:"uri"`
	// Used without a URI, or if the URI lacks the attribute.
	TokenLabel  string `yaml:"tokenLabel"`
	TokenSerial string `yaml:"tokenSerial"`
	KeyLabel    string `yaml:"keyLabel"`

	PINFile string `yaml:"pinFile"`
	// SealedPINFile holds, instead of PINFile, a PIN that only this node's TPM can unseal.
	SealedPINFile string        `yaml:"sealedPINFile"`
	Timeout       time.Duration `yaml:"timeout"`
}

// Vault is a Transit key of Vault or OpenBao. Without an address there is none.
type Vault struct {
	Address    string        `yaml:"address"`
	Namespace  string        `yaml:"namespace"`
	Mount      string        `yaml:"mount"`
	Key        string        `yaml:"key"`
	CAFile     string        `yaml:"caFile"`
	ServerName string        `yaml:"serverName"`
	Timeout    time.Duration `yaml:"timeout"`
	Auth       VaultAuth     `yaml:"auth"`
}

// VaultAuth says how to log in to Vault.
type VaultAuth struct {
	Method          string `yaml:"method"`
	Mount           string `yaml:"mount"`
	Role            string `yaml:"role"`
	TokenFile       string `yaml:"tokenFile"`
	RoleID          string `yaml:"roleID"`
	SecretIDFile    string `yaml:"secretIDFile"`
	SecretIDWrapped bool   `yaml:"secretIDWrapped"`
	JWTFile         string `yaml:"jwtFile"`
	CertFile        string `yaml:"certFile"`
	KeyFile         string `yaml:"keyFile"`
	// TPMKeyFile holds, instead of KeyFile, a key that only this node's TPM can use.
	TPMKeyFile string `yaml:"tpmKeyFile"`
}

// KMSPlugin is another KMS v2 plugin, which wraps the KEK. Without a socket there is none.
type KMSPlugin struct {
	Socket  string        `yaml:"socket"`
	Timeout time.Duration `yaml:"timeout"`
}

// Memory says what to do if memory can't be locked.
type Memory struct {
	Lock string `yaml:"lock"`
}

// The values of memory.lock.
const (
	LockRequired   = "required"
	LockBestEffort = "best-effort"
)

// KMS is the socket that kube-apiserver calls.
type KMS struct {
	// Name is the provider's name in kube-apiserver's EncryptionConfiguration.
	Name        string   `yaml:"name"`
	Socket      string   `yaml:"socket"`
	SocketMode  FileMode `yaml:"socketMode" want:"permission bits in octal, no write for others (\"0660\")"`
	SocketUID   int      `yaml:"socketUID"`
	SocketGID   int      `yaml:"socketGID"`
	AllowedUIDs []uint32 `yaml:"allowedUIDs"`
}

// Admin is the socket that the command line calls.
type Admin struct {
	Socket string `yaml:"socket"`
}

// HTTP says where /livez, /readyz and /metrics answer; "" means nowhere.
type HTTP struct {
	Socket     string   `yaml:"socket"`
	SocketMode FileMode `yaml:"socketMode" want:"permission bits in octal, no write for others (\"0660\")"`
	SocketGID  int      `yaml:"socketGID"`
	Address    string   `yaml:"address"`
}

// Cluster is the cluster store; without a kubeconfig there is none.
type Cluster struct {
	Kubeconfig string `yaml:"kubeconfig"`
}

// Join says where other nodes join. Without an address to listen on, no node can join.
type Join struct {
	Listen string `yaml:"listen"`
	// Advertise is the address at which other nodes reach this one; Listen if empty.
	Advertise string `yaml:"advertise"`
}

// Audit says where to record which node received the KEK; see AuditPath.
type Audit struct {
	File string `yaml:"file"`
}

// Log says what to log, and how.
type Log struct {
	Level  slog.Level `yaml:"level" want:"debug, info, warn or error"`
	Format string     `yaml:"format"`
}

// FileMode is a socket's permission bits, written in octal: "0660".
type FileMode fs.FileMode

// othersWrite is the permission bit that lets everybody connect to a socket.
const othersWrite = 0o002

// UnmarshalText implements encoding.TextUnmarshaler. It refuses a socket that
// nobody or everybody could connect to.
func (m *FileMode) UnmarshalText(b []byte) error {
	v, err := strconv.ParseUint(string(b), 8, 32)
	if err != nil || v == 0 || v > 0o777 || v&othersWrite != 0 {
		return errors.New(`want permission bits in octal, no write for others, "0660" for instance`)
	}
	*m = FileMode(v)
	return nil
}

// Default returns the configuration of a machine without a configuration file.
func Default() *Config {
	return &Config{
		APIVersion: APIVersion,
		Kind:       Kind,
		State:      State{Dir: "/var/lib/kleidi"},
		TPM: TPM{
			Device: device.DefaultAddress, Timeout: device.DefaultTimeout, Bank: "sha256", EpochIndex: nv.DefaultEpochIndex,
			EventLog: attest.FirmwareLog, UserspaceEventLog: attest.UserspaceLog, Phase: "ready", Verifier: Verifier{Timeout: 20 * time.Second},
			BootStates: []string{"/run/systemd/tpm2-pcr-signature.json", "/etc/systemd/tpm2-pcr-signature.json", "/usr/lib/systemd/tpm2-pcr-signature.json", "/.extra/tpm2-pcr-signature.json"},
		},
		Anchor:    Anchor{Store: AnchorFile, Index: nv.DefaultAnchorIndex, PCRs: []int{7}},
		Unlock:    Unlock{Order: []string{seal.TypeTPM}, RequireAttestation: true, SelfTest: 24 * time.Hour},
		PKCS11:    PKCS11{Timeout: hsm.DefaultTimeout},
		Vault:     Vault{Mount: "transit", Timeout: 15 * time.Second},
		KMSPlugin: KMSPlugin{Timeout: 10 * time.Second},
		Memory:    Memory{Lock: LockRequired},
		KMS:       KMS{Name: "kleidi", Socket: "/run/kleidi/kms.sock", SocketMode: 0o600, SocketUID: -1, SocketGID: -1},
		Admin:     Admin{Socket: "/run/kleidi/admin.sock"},
		HTTP:      HTTP{Socket: "/run/kleidi/http.sock", SocketMode: 0o600, SocketGID: -1},
		Log:       Log{Level: slog.LevelInfo, Format: "text"},
	}
}

// Configured reports whether anything names a token, its module or its key.
func (c PKCS11) Configured() bool {
	return c.Module+c.URI+c.TokenLabel+c.TokenSerial+c.KeyLabel != ""
}

// Wrapper returns the configuration for package hsm. sealed returns the PIN if it is
// sealed to the TPM.
func (c PKCS11) Wrapper(mem seal.Memory, sealed func(context.Context) (*seal.Secret, error)) hsm.Config {
	h := hsm.Config{Module: c.Module, InitArgs: c.InitArgs, URI: c.URI, TokenLabel: c.TokenLabel, TokenSerial: c.TokenSerial, KeyLabel: c.KeyLabel,
		PINFile: c.PINFile, Timeout: c.Timeout, Memory: mem}
	if c.SealedPINFile != "" {
		h.PIN = sealed
	}
	return h
}

// Wrapper returns the configuration for package vault. certificate returns the client
// certificate if its key is in the TPM.
func (c Vault) Wrapper(mem seal.Memory, certificate func(context.Context) (*tls.Certificate, error)) vault.Config {
	a := c.Auth
	v := vault.Config{Address: c.Address, Namespace: c.Namespace, Mount: c.Mount, Key: c.Key, CAFile: c.CAFile, ServerName: c.ServerName, Timeout: c.Timeout, Memory: mem,
		Auth: vault.Auth{Method: vault.Method(a.Method), Mount: a.Mount, Role: a.Role, TokenFile: a.TokenFile, RoleID: a.RoleID, SecretIDFile: a.SecretIDFile,
			SecretIDWrapped: a.SecretIDWrapped, JWTFile: a.JWTFile, CertFile: a.CertFile, KeyFile: a.KeyFile}}
	if a.TPMKeyFile != "" {
		v.Auth.CertFile, v.Auth.KeyFile, v.Auth.ClientCertificate = "", "", certificate
	}
	return v
}

// Wrapper returns the configuration for package kmsplugin.
func (c KMSPlugin) Wrapper(mem seal.Memory) kmsplugin.Config {
	return kmsplugin.Config{Socket: c.Socket, Timeout: c.Timeout, Memory: mem}
}

// Keyring is the path of the keyring.
func (c *Config) Keyring() string { return filepath.Join(c.State.Dir, "keyring.json") }

// AuditPath is the path of the audit log.
func (c *Config) AuditPath() string {
	if c.Audit.File != "" {
		return c.Audit.File
	}
	return filepath.Join(c.State.Dir, "audit.log")
}

// ArchivePath is the path to which kleidi prune writes the archive of a KEK, unless the
// operator names a file.
func (c *Config) ArchivePath(id seal.KeyID) string {
	return filepath.Join(c.State.Dir, "archive-"+string(id)+".json")
}

// BootStates is the path of the added signed boot states.
func (c *Config) BootStates() string { return filepath.Join(c.State.Dir, "bootstates.json") }

// Removal is the path of the keyring that removed this node.
func (c *Config) Removal() string { return filepath.Join(c.State.Dir, "removed.json") }

// SlotRecord is the path of the record of the slots that commands on this node made.
func (c *Config) SlotRecord() string { return filepath.Join(c.State.Dir, "slots.json") }

// Kubeconfig is the path of the kubeconfig, where kleidi cluster setup writes it.
func (c *Config) Kubeconfig() string {
	if c.Cluster.Kubeconfig != "" {
		return c.Cluster.Kubeconfig
	}
	return filepath.Join(c.State.Dir, "cluster.kubeconfig")
}

// AnchorPath is the path of the anchor, if the anchor is a file.
func (c *Config) AnchorPath() string { return filepath.Join(c.State.Dir, "anchor.json") }

// Bank is the PCR bank.
func (c *Config) Bank() crypto.Hash {
	if c.TPM.Bank == "sha384" {
		return crypto.SHA384
	}
	return crypto.SHA256
}
