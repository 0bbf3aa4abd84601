package simboot

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot/internal/swtpm"
)

// The names in a machine's folder. The control socket has the name that tpm2-tools
// expect, so that TPM2TOOLS_TCTI=swtpm:path=DIR/tpm.sock reaches the TPM.
const (
	socketName    = "tpm.sock"
	controlName   = socketName + ".ctrl"
	stateName     = "tpm"
	logName       = "swtpm.log"
	bootName      = "boot.json"
	lockName      = "lock"
	eventLogName  = "binary_bios_measurements"
	userspaceName = "tpm2-measure.log"
	filesName     = "boot"
)

// maxSocketPath bounds the path of a unix socket, in bytes (unix(7): 108 with the
// terminating zero).
const maxSocketPath = 107

// ErrNoSwtpm says that swtpm is not installed.
var ErrNoSwtpm = swtpm.ErrMissing

// ErrInUse says that another process, or another Machine, runs a TPM over the folder.
var ErrInUse = errors.New("the machine's folder is in use")

// Machine is a machine with a TPM. Its methods may be called concurrently.
type Machine struct {
	dir string

	mu      sync.Mutex
	proc    *swtpm.Process // nil while the machine is off
	lock    *os.File       // held while the machine is on
	current Boot
}

// New returns the machine whose state is in dir. It makes the folder (0700) if it is
// missing. A new folder is a new TPM. A known folder is the same TPM as before, even if
// the process that ran it was killed. The machine is off. The path of the folder may
// have 93 bytes, because the sockets in it need short paths.
func New(dir string) (*Machine, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("simulated machine: %w", err)
	}
	m := &Machine{dir: dir}
	if n := len(m.controlSocket()); n > maxSocketPath {
		return nil, fmt.Errorf("simulated machine: %s has %d bytes, the path of a unix socket has at most %d; choose a folder with a shorter path",
			m.controlSocket(), n, maxSocketPath)
	}
	if err := os.MkdirAll(m.path(stateName), 0o700); err != nil {
		return nil, fmt.Errorf("simulated machine: %w", err)
	}
	if m.current, err = readBoot(m.path(bootName)); err != nil {
		return nil, fmt.Errorf("simulated machine: %w; remove %s to start over with the same TPM", err, m.path(bootName))
	}
	return m, nil
}

func readBoot(path string) (b Boot, err error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Boot{}, nil
	}
	if err != nil {
		return Boot{}, err
	}
	if err := json.Unmarshal(raw, &b); err != nil {
		return Boot{}, fmt.Errorf("%s: %w", path, err)
	}
	return b, b.Validate()
}

func (m *Machine) path(name string) string { return filepath.Join(m.dir, name) }
func (m *Machine) socket() string          { return m.path(socketName) }
func (m *Machine) controlSocket() string   { return m.path(controlName) }

func (m *Machine) paths() swtpm.Paths {
	return swtpm.Paths{State: m.path(stateName), Socket: m.socket(), Control: m.controlSocket(), Log: m.path(logName)}
}

// Dir returns the machine's folder.
func (m *Machine) Dir() string { return m.dir }

// Device returns the TPM's address, as device.ParseAddress reads it. It stays the
// same across boots.
func (m *Machine) Device() string { return "unix:" + m.socket() }

// EventLog returns the path of the firmware's event log, which each boot replaces.
func (m *Machine) EventLog() string { return m.path(eventLogName) }

// UserspaceLog returns the path of systemd's log. There is no such file after a
// boot whose user space measured nothing.
func (m *Machine) UserspaceLog() string { return m.path(userspaceName) }

// Files returns the folder with the files of the machine's last boot: see
// [Files.Write].
func (m *Machine) Files() string { return m.path(filesName) }

// Current returns the machine's last boot, even one in an earlier process, or the zero
// Boot if it never booted.
func (m *Machine) Current() Boot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current
}

// Boot switches the machine off, if it is on, and boots b: it resets the TPM, extends
// the boot's measurements into every active bank, and writes the logs. After an error,
// the machine is off. The error is [ErrNoSwtpm] if swtpm is missing, and [ErrInUse] if
// another process uses the folder.
func (m *Machine) Boot(ctx context.Context, b Boot) (err error) {
	if err := b.Validate(); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.powerOff(); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	if m.lock, err = lockFile(ctx, m.path(lockName)); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	if m.proc, err = swtpm.Start(ctx, m.paths(), m.lock); err == nil {
		err = m.measure(ctx, b)
	}
	if err != nil {
		_ = m.powerOff()
		return fmt.Errorf("boot: %w", err)
	}
	return nil
}

// measure plays b on the TPM that has just started.
func (m *Machine) measure(ctx context.Context, b Boot) error {
	var log *eventlog.Log
	var userspaceLog []byte
	files, err := b.Files()
	if err != nil {
		return err
	}
	err = m.tpm().Do(ctx, func(t transport.TPM) error {
		banks, err := activeBanks(t)
		if err != nil {
			return err
		}
		events, err := measure(b, files, banks)
		if err != nil {
			return err
		}
		log = &eventlog.Log{Banks: banks, Events: events}
		later, raw, err := userspace(b, banks)
		if err != nil {
			return err
		}
		userspaceLog = raw
		for _, e := range append(events, later...) {
			if err := extend(t, e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := files.Write(m.Files()); err != nil {
		return err
	}
	return m.record(b, log.Encode(), userspaceLog)
}

// record writes the logs and remembers the boot.
func (m *Machine) record(b Boot, log, userspaceLog []byte) error {
	raw, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return err
	}
	if err := writeFile(m.EventLog(), log); err != nil {
		return err
	}
	if userspaceLog == nil {
		err = os.Remove(m.UserspaceLog())
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	} else {
		err = writeFile(m.UserspaceLog(), userspaceLog)
	}
	if err != nil {
		return err
	}
	if err := writeFile(m.path(bootName), append(raw, '\n')); err != nil {
		return err
	}
	m.current = b
	return nil
}

func (m *Machine) tpm() *device.Device {
	addr, err := device.ParseAddress(m.Device())
	if err != nil {
		panic(err) // the folder's path is absolute
	}
	return device.New(addr, 0)
}

// PowerOff switches the machine off in an orderly way: it sends TPM2_Shutdown, as a
// kernel does, and then ends swtpm. A machine that is off stays off.
func (m *Machine) PowerOff() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.powerOff()
}

// shutdownTimeout is how long TPM2_Shutdown may wait for another client of the TPM.
const shutdownTimeout = 3 * time.Second

func (m *Machine) powerOff() (err error) {
	if m.proc != nil {
		ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
		defer cancel()
		// A TPM without a shutdown still starts, and counts the missing shutdown.
		_ = m.tpm().Do(ctx, func(t transport.TPM) error {
			_, err := tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(t)
			return err
		})
		err = m.proc.Stop()
	}
	m.forget()
	return err
}

// CutPower switches the machine off as a power failure does.
func (m *Machine) CutPower() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.proc != nil {
		m.proc.Kill()
	}
	m.forget()
}

func (m *Machine) forget() {
	m.proc = nil
	if m.lock != nil {
		m.lock.Close()
		m.lock = nil
	}
}

// Clear clears the TPM, as firmware does on a user's request (TPM2_Clear with platform
// authorization). The TPM gets a new storage seed and loses every object below the old
// one. The endorsement key stays. The machine must be on.
func (m *Machine) Clear(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.proc == nil {
		return errors.New("clear: the machine is off; boot it first")
	}
	return m.tpm().Do(ctx, func(t transport.TPM) error {
		if _, err := (tpm2.Clear{AuthHandle: tpm2.TPMRHPlatform}).Execute(t); err != nil {
			return fmt.Errorf("TPM2_Clear: %w", err)
		}
		return nil
	})
}

// inUseTimeout is how long lockFile waits for another process.
const inUseTimeout = 5 * time.Second

// lockFile takes the lock, which swtpm holds too. A swtpm whose parent was killed ends
// at once, so lockFile waits a moment.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, inUseTimeout)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if err != unix.EWOULDBLOCK {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("%w: %s is locked; end the other kleidi dev, or choose another folder", ErrInUse, path)
		}
	}
}

// hashes are the algorithms of PCR banks.
var hashes = map[tpm2.TPMAlgID]crypto.Hash{
	tpm2.TPMAlgSHA1: crypto.SHA1, tpm2.TPMAlgSHA256: crypto.SHA256,
	tpm2.TPMAlgSHA384: crypto.SHA384, tpm2.TPMAlgSHA512: crypto.SHA512,
}

// activeBanks returns the banks that have PCRs.
func activeBanks(t transport.TPM) ([]crypto.Hash, error) {
	active, err := keys.ActiveBanks(t)
	if err != nil {
		return nil, err
	}
	banks := make([]crypto.Hash, len(active))
	for i, id := range active {
		hash, ok := hashes[id]
		if !ok {
			return nil, fmt.Errorf("the TPM has a bank of algorithm 0x%x, for which there is no hash", uint16(id))
		}
		banks[i] = hash
	}
	return banks, nil
}

// extend extends an event into all banks.
func extend(t transport.TPM, e eventlog.Event) error {
	var digests []tpm2.TPMTHA
	for id, hash := range hashes {
		if d := e.Digest(hash); d != nil {
			digests = append(digests, tpm2.TPMTHA{HashAlg: id, Digest: d})
		}
	}
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.TPMHandle(e.PCR),
		Digests:   tpm2.TPMLDigestValues{Digests: digests},
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("TPM2_PCR_Extend: %w", err)
	}
	return nil
}
