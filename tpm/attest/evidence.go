package attest

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// The paths at which Linux and systemd keep the event logs.
const (
	FirmwareLog  = "/sys/kernel/security/tpm0/binary_bios_measurements"
	UserspaceLog = "/run/log/systemd/tpm2-measure.log"
)

// Logs names the two event logs. An absent userspace log counts as empty: most machines
// have none.
type Logs struct {
	Firmware  string
	Userspace string
}

// userspaceFlag returns systemd's log as a command line flag, or "" if there is no such
// log.
func (l Logs) userspaceFlag() string {
	if _, err := os.Stat(l.Userspace); err != nil {
		return ""
	}
	return " --userspace-event-log " + seal.Quote(l.Userspace)
}

// Bytes returns both logs unchanged, each of at most eventlog.MaxSize bytes.
func (l Logs) Bytes() (firmware, userspace []byte, err error) {
	if firmware, err = readBounded(l.Firmware); err != nil {
		return nil, nil, seal.Errorf(seal.CauseAttestation,
			"check that securityfs is mounted and that tpm.eventLog names the firmware's log; a machine that measures nothing can't be attested",
			"firmware event log: %w", err)
	}
	userspace, err = readUserspace(l.Userspace)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, seal.Errorf(seal.CauseAttestation, "see tpm.userspaceEventLog, and try again; if it stays, restart the machine", "userspace event log: %w", err)
	}
	return firmware, userspace, nil
}

// lockTimeout is how long to wait for a writer of the userspace log. systemd holds its
// lock while it extends a PCR and writes a record.
const lockTimeout = 2 * time.Second

// readUserspace reads systemd's log under a shared lock, so that it never reads half a
// record. systemd sets the sticky bit while it writes. A sticky bit without a lock
// means that a writer ended too early and that a measurement may be missing.
func readUserspace(path string) ([]byte, error) {
	f, err := regular.OpenArgument(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() // this also releases the lock
	if err := lockShared(f, lockTimeout); err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Mode()&fs.ModeSticky != 0 {
		err = fmt.Errorf("%s is marked as incomplete (sticky bit): whoever measured was interrupted", path)
	}
	if err != nil {
		return nil, err
	}
	return readAll(f)
}

// lockShared waits for a shared lock. If the file system has no locks, as may be the
// case for a copy of the log, nobody can hold one.
func lockShared(f *os.File, timeout time.Duration) error {
	for end := time.Now().Add(timeout); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		if err != unix.EWOULDBLOCK {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s has been locked for %s by another process, as systemd does while it measures", f.Name(), timeout)
		}
		<-time.After(10 * time.Millisecond)
	}
}

func readBounded(path string) ([]byte, error) {
	f, err := regular.OpenArgument(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f)
}

func readAll(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, eventlog.MaxSize+1))
	if err == nil && len(b) > eventlog.MaxSize {
		err = fmt.Errorf("%s is larger than %d MiB", f.Name(), eventlog.MaxSize>>20)
	}
	return b, err
}

// Explaining returns the logs as Bytes does, for a quote of these PCRs. It adds the
// phases of the boot that an older systemd measured without logging them.
func (l Logs) Explaining(bank crypto.Hash, quoted eventlog.PCRs) (firmware, userspace []byte, err error) {
	if firmware, userspace, err = l.Bytes(); err != nil {
		return nil, nil, err
	}
	if log, err := eventlog.Parse(firmware); err == nil && len(userspace) == 0 {
		userspace = log.UnloggedPhases(bank, quoted)
	}
	return firmware, userspace, nil
}

// Read returns the firmware's events followed by those of userspace. Nothing
// vouches for them.
func (l Logs) Read() (*eventlog.Log, error) {
	firmware, userspace, err := l.Bytes()
	if err != nil {
		return nil, err
	}
	log, err := parseLogs(firmware, userspace)
	if err != nil {
		return nil, refuse(err)
	}
	return log, nil
}

// parseLogs returns the firmware's events followed by those of userspace.
func parseLogs(firmware, userspace []byte) (*eventlog.Log, error) {
	log, err := eventlog.Parse(firmware)
	if err != nil {
		return nil, fmt.Errorf("firmware event log: %w", err)
	}
	events, err := eventlog.ParseUserspace(userspace)
	if err != nil {
		return nil, &userspaceError{err}
	}
	log.Append(events)
	return log, nil
}

// Evidence is a machine's claim of how it booted. Believe nothing in it before Verify.
type Evidence struct {
	Quote        keys.Quote
	FirmwareLog  []byte
	UserspaceLog []byte
}

// Attester gathers evidence on the machine that it runs on.
type Attester struct {
	Device *device.Device
	Owner  keys.Owner
	Logs   Logs
	// AK keeps the attestation key. If nil, each quote uses a fresh one.
	AK keys.AKStore
}

// Collect quotes exactly these PCRs with the verifier's nonce. srk is as in
// [keys.Quoter.Quote].
func (a *Attester) Collect(ctx context.Context, srk, nonce []byte, bank crypto.Hash, pcrs []int) (*Evidence, error) {
	q, err := keys.Quoter{Device: a.Device, Owner: a.Owner, AK: a.AK}.Quote(ctx, srk, nonce, bank, pcrs)
	if err != nil {
		return nil, err
	}
	// The logs are read after the quote. An event in between then appears as a replay
	// that does not match; in the other order, a log without the event could match.
	firmware, userspace, err := a.Logs.Explaining(bank, q.PCRs)
	if err != nil {
		return nil, err
	}
	return &Evidence{Quote: *q, FirmwareLog: firmware, UserspaceLog: userspace}, nil
}
