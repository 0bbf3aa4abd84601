package measuredboot

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// bootTime bounds one boot, on a busy host. It exceeds the guest's own limits, so that their
// results arrive.
const bootTime = 40 * time.Minute

// Firmware variables with which a machine may begin.
const (
	ownKeys       = ovmf + "OVMF_VARS_4M.snakeoil.fd"
	microsoftKeys = ovmf + "OVMF_VARS_4M.ms.fd"
	noKeys        = ovmf + "OVMF_VARS_4M.fd"
)

// machine is everything that lasts from boot to boot: a TPM, firmware variables, and
// the disk with kleidi's state.
type machine struct {
	t         *testing.T
	forge     *forge
	dir       string
	variables string      // the firmware's, below dir
	settings  string      // added to kleidi's configuration
	files     []disk.File // further files on the machine
	handed    []string    // QEMU's arguments for a kernel that QEMU hands to the firmware
	network   bool        // the machine reaches this one, as wire.Host
	state     []disk.File
	// From the first boot: its facts, and a DEK seed, plain and encrypted.
	first *wire.Facts
	seed  []byte
	under *wire.Sealed
}

// newMachine makes a machine whose firmware has these variables, and a fresh TPM.
func newMachine(t *testing.T, f *forge, variables string) *machine {
	t.Helper()
	m := &machine{t: t, forge: f, dir: t.TempDir()}
	m.newTPM()
	m.setVariables(variables)
	return m
}

// newTPM gives the machine another TPM, in its delivery state.
func (m *machine) newTPM() {
	m.t.Helper()
	for _, err := range []error{os.RemoveAll(m.path("tpm")), os.Mkdir(m.path("tpm"), 0o700)} {
		if err != nil {
			m.t.Fatal(err)
		}
	}
	// Only one bank: the firmware and the stub compute each digest in every bank
	must[string](m.t)(output("swtpm_setup", "--tpm2", "--tpmstate", m.path("tpm"), "--pcr-banks", "sha256", "--logfile", m.path("swtpm_setup.log")))
}

// setVariables gives the firmware other variables. Variables that the firmware writes
// stay in the file that it then uses.
func (m *machine) setVariables(file string) {
	m.t.Helper()
	m.variables = m.path(filepath.Base(file))
	if _, err := os.Stat(m.variables); err == nil {
		return
	}
	b := must[[]byte](m.t)(os.ReadFile(file))
	if err := os.WriteFile(m.variables, b, 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// resetVariables gives the firmware its first variables.
func (m *machine) resetVariables() {
	m.t.Helper()
	b := must[[]byte](m.t)(os.ReadFile(ovmf + filepath.Base(m.variables)))
	if err := os.WriteFile(m.variables, b, 0o600); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

// booted is the result of one boot.
type booted struct {
	// started says whether the firmware ran the guest; said is the firmware's message
	// if not.
	started bool
	said    string
	results []wire.Result
	console string
	took    time.Duration
}

// facts returns the state in which the guest found the machine.
func (b *booted) facts() *wire.Facts {
	if len(b.results) == 0 {
		return nil
	}
	return b.results[0].Machine
}

// boot starts the machine from an image, and returns when it has powered off.
func (m *machine) boot(i image, files []disk.File, steps ...wire.Step) (*booted, error) {
	i.network = m.network
	esp, err := m.forge.disk(i)
	if err != nil {
		return nil, err
	}
	script, err := json.Marshal(wire.Script{Steps: steps})
	if err != nil {
		return nil, err
	}
	files = append([]disk.File{{Name: wire.ScriptName, Mode: 0o600, Data: script}, m.configuration()}, append(files, m.files...)...)
	for name, content := range map[string][]disk.File{wire.Request: files, wire.State: m.state} {
		if err := m.writeDisk(name, content); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(m.path(wire.Tools), padded(m.forge.root(i)), 0o600); err != nil {
		return nil, err
	}
	b := &booted{}
	if err := m.run(esp, b); err != nil || !b.started {
		return b, err
	}
	return b, m.readState(b)
}

func (m *machine) configuration() disk.File {
	settings := m.settings
	if !strings.Contains(settings, "tpm:\n") {
		settings += patientTPM
	}
	return disk.File{Name: "etc/kleidi/config.yaml", Mode: 0o600, Data: []byte(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: cp1
` + settings)}
}

// patientTPM gives the emulated TPM time, on a busy host.
const patientTPM = "tpm: {timeout: 4m}\n"

// stateSize is enough for the state folder and the results, event log included.
const stateSize = 8 << 20

func (m *machine) writeDisk(name string, files []disk.File) error {
	var b bytes.Buffer
	if err := disk.Pack(&b, files); err != nil {
		return err
	}
	if name == wire.State {
		if b.Len() > stateSize {
			return fmt.Errorf("the state takes %d bytes", b.Len())
		}
		b.Write(make([]byte, stateSize-b.Len()))
	}
	return os.WriteFile(m.path(name), padded(b.Bytes()), 0o600)
}

// padded fills the last sectors. The kernel looks for partitions in the first 64 KiB.
func padded(b []byte) []byte { return append(b[:len(b):len(b)], make([]byte, -len(b)&0xffff)...) }

// readState reads the state disk of a machine that is off.
func (m *machine) readState(b *booted) error {
	f, err := os.Open(m.path(wire.State))
	if err != nil {
		return err
	}
	defer f.Close()
	files, err := disk.Read(f)
	if err != nil {
		return err
	}
	m.state = nil
	for _, file := range files {
		if file.Name != wire.ResultsName {
			m.state = append(m.state, file)
			continue
		}
		for d := json.NewDecoder(bytes.NewReader(file.Data)); ; {
			var r wire.Result
			if err := d.Decode(&r); err == io.EOF {
				break
			} else if err != nil {
				return err
			}
			b.results = append(b.results, r)
		}
	}
	if len(b.results) == 0 {
		return fmt.Errorf("the guest left no results\nthe console:\n%s", tail(b.console, 40))
	}
	return nil
}

// keyring returns the keyring in the state folder.
func (m *machine) keyring() *keyring.Untrusted {
	m.t.Helper()
	for _, f := range m.state {
		if "/"+f.Name == keyringFile {
			return must[*keyring.Untrusted](m.t)(keyring.Parse(f.Data))
		}
	}
	m.t.Fatal("the state folder has no keyring")
	return nil
}

const keyringFile = wire.StateDir + "/keyring.json"

// tail returns the last lines of a console, without control sequences that move the
// cursor.
func tail(console string, lines int) string {
	clean := strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' {
			return -1
		}
		return r
	}, console)
	all := strings.Split(strings.TrimSpace(clean), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
