// Package wire is what the host and the guest of a test boot tell each other. A
// disk without a partition table carries it, told from the others by its serial
// number: nothing that the host asks for is measured into a PCR.
package wire

// Serial numbers of the disks. Each holds a tar archive, zeros after it.
const (
	// Tools has the programs: what a root file system would hold. The initrd
	// knows its digest, as it would know a verity root hash.
	Tools = "tools"
	// Request has [ScriptName] and other files, each under its path in the guest.
	Request = "request"
	// State has what is kept from boot to boot, [StateDir], and [ResultsName].
	State = "state"
)

// Paths of the guest.
const (
	// ToolsDigest is in the initrd: the SHA-256 of the tools' archive, in hex, and
	// the archive's size.
	ToolsDigest = "/tools.sha256"
	// Driver is run by the initrd's init, as PID 1; or by systemd, where that is
	// among the tools, and then PID 1.
	Driver  = "/usr/bin/driver"
	Systemd = "/lib/systemd/systemd"
	// Kleidi is the binary under test.
	Kleidi = "/usr/local/bin/kleidi"
	// ScriptName is the Script, in JSON.
	ScriptName = "/script.json"
	// ResultsName is one Result in JSON per line.
	ResultsName = "results.jsonl"
	// StateDir is kept from boot to boot.
	StateDir = "/var/lib/kleidi"
	// Seen is printed to the console when the kernel has started the guest's init.
	Seen = "GUEST: init"
)

// Script is what one boot does.
type Script struct {
	Steps []Step `json:"steps"`
}

// Step is one thing to do. Exactly one field is set.
type Step struct {
	// Run is a command line: a program and its arguments, no shell.
	Run []string `json:"run,omitempty"`
	// Serve starts kleidi serve, where systemd has not, and returns once it has tried
	// to open the keyring.
	Serve bool `json:"serve,omitempty"`
	// Stop ends it.
	Stop bool `json:"stop,omitempty"`
	// Encrypt asks for the encryption of a DEK seed.
	Encrypt []byte `json:"encrypt,omitempty"`
	// Decrypt asks for the decryption of what an Encrypt gave.
	Decrypt *Sealed `json:"decrypt,omitempty"`
	// Move renames a file or a folder; what was there is removed.
	Move *[2]string `json:"move,omitempty"`
	// Copy copies a file.
	Copy *[2]string `json:"copy,omitempty"`
	// Forge makes a keyring around the KEK of another one.
	Forge *Forge `json:"forge,omitempty"`
	// Undefine removes an NV index with the empty owner authorization.
	Undefine uint32 `json:"undefine,omitempty"`
}

// Forge is what somebody does who knows the KEK of a keyring that he made, and
// wants it taken for the real one: the cluster ID is that of the real one, and so is
// all that was public.
type Forge struct {
	// Real and Own are keyring files; the forged one is written in the place of Real.
	Real string `json:"real"`
	Own  string `json:"own"`
	// Identity opens Own.
	Identity string `json:"identity"`
}

// Sealed is a DEK seed as kube-apiserver stores it.
type Sealed struct {
	KeyID       string            `json:"keyID"`
	Ciphertext  []byte            `json:"ciphertext"`
	Annotations map[string][]byte `json:"annotations,omitempty"`
}

// Result is what one Step gave, or, without a Step, the machine as it was before
// the first one.
type Result struct {
	Step *Step `json:"step,omitempty"`
	// Error is why the step failed: a gRPC error, or how a command ended.
	Error  string `json:"error,omitempty"`
	Stdout string `json:"stdout,omitempty"`
	Stderr string `json:"stderr,omitempty"`
	// Status is what kleidi status -o json says after Serve.
	Status string `json:"status,omitempty"`
	// Healthz and KeyID are KMS v2 Status's, after Serve.
	Healthz string  `json:"healthz,omitempty"`
	KeyID   string  `json:"keyID,omitempty"`
	Sealed  *Sealed `json:"sealed,omitempty"`
	Plain   []byte  `json:"plain,omitempty"`
	Machine *Facts  `json:"machine,omitempty"`
}

// Facts describe the running boot.
type Facts struct {
	Kernel      string `json:"kernel"`
	CommandLine string `json:"commandLine"`
	SecureBoot  bool   `json:"secureBoot"`
	// PCRs are the SHA-256 bank's, in hex.
	PCRs map[int]string `json:"pcrs"`
	// EventLog is the firmware's.
	EventLog []byte `json:"eventLog"`
}
