// Package wire defines the messages between the host and the guest of a test boot.
// Disks without a partition table carry them; a serial number identifies each disk. No
// request of the host is measured into a PCR.
package wire

// Serial numbers of the disks. Each holds a tar archive, zeros after it.
const (
	// Tools has the programs, in place of a root file system. The initrd holds its
	// digest, as it would hold a verity root hash.
	Tools = "tools"
	// Request has [ScriptName] and other files, each under its path in the guest.
	Request = "request"
	// State has everything that lasts from boot to boot, [StateDir], and [ResultsName].
	State = "state"
)

// Addresses of a machine with a network: Guest is its own, and at Host it reaches the
// loopback of the machine that runs the test.
const (
	Net   = "10.0.2.0/24"
	Guest = "10.0.2.15"
	Host  = "10.0.2.2"
)

// Paths of the guest.
const (
	// ToolsDigest is in the initrd: the SHA-256 of the tools' archive, in hex, and the
	// size of the archive.
	ToolsDigest = "/tools.sha256"
	// Driver runs as PID 1 after the initrd's init. If systemd is among the tools,
	// systemd is PID 1 and runs Driver.
	Driver  = "/usr/bin/driver"
	Systemd = "/lib/systemd/systemd"
	// Kleidi is the binary under test.
	Kleidi = "/usr/local/bin/kleidi"
	// ScriptName is the Script, in JSON.
	ScriptName = "/script.json"
	// ResultsName is one Result in JSON per line.
	ResultsName = "results.jsonl"
	// StateDir lasts from boot to boot.
	StateDir = "/var/lib/kleidi"
	// Seen is printed to the console when the kernel has started the guest's init.
	Seen = "GUEST: init"
)

// Script holds the steps of one boot.
type Script struct {
	Steps []Step `json:"steps"`
}

// Step is one step. Exactly one field is set, apart from Config and Again.
type Step struct {
	// Run is a command line: a program and its arguments, no shell.
	Run []string `json:"run,omitempty"`
	// Again has Run repeated, 20 times, while its error output contains this text.
	Again string `json:"again,omitempty"`
	// Serve starts kleidi serve, unless systemd has, and returns once kleidi has tried
	// to open the keyring.
	Serve bool `json:"serve,omitempty"`
	// Config is the configuration that Serve takes in the place of the machine's own.
	Config string `json:"config,omitempty"`
	// Stop ends kleidi serve.
	Stop bool `json:"stop,omitempty"`
	// Encrypt asks for the encryption of a DEK seed.
	Encrypt []byte `json:"encrypt,omitempty"`
	// Decrypt asks for the decryption of an Encrypt's result.
	Decrypt *Sealed `json:"decrypt,omitempty"`
	// Move renames a file or a folder, and replaces the target.
	Move *[2]string `json:"move,omitempty"`
	// Copy copies a file.
	Copy *[2]string `json:"copy,omitempty"`
	// Forge makes a keyring around the KEK of another keyring.
	Forge *Forge `json:"forge,omitempty"`
	// Undefine removes an NV index with the empty owner authorization.
	Undefine uint32 `json:"undefine,omitempty"`
}

// Forge is an attacker's forgery. The attacker knows the KEK of a keyring that he made,
// and wants that keyring accepted as the real one: the cluster ID and everything else
// that is public come from the real keyring.
type Forge struct {
	// Real and Own are keyring files; the forged keyring replaces Real.
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

// Result is the result of one Step. Without a Step, it describes the machine before the
// first step.
type Result struct {
	Step *Step `json:"step,omitempty"`
	// Error is the reason why the step failed: a gRPC error, or how a command ended.
	Error  string `json:"error,omitempty"`
	Stdout string `json:"stdout,omitempty"`
	Stderr string `json:"stderr,omitempty"`
	// Status is the output of kleidi status -o json after Serve.
	Status string `json:"status,omitempty"`
	// Healthz and KeyID come from KMS v2 Status, after Serve.
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
	// PCRs are the values of the SHA-256 bank, in hex.
	PCRs map[int]string `json:"pcrs"`
	// EventLog is the firmware's log.
	EventLog []byte `json:"eventLog"`
}
