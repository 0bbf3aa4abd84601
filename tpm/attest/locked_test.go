package attest_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// half is the beginning of a record, as during a write.
const half = "\x1e" + `{"pcr":11,"digests":[{"hashAlg":"sha256","digest":"`

// writing returns logs whose userspace log is being written, under an exclusive lock.
func writing(t *testing.T) (logs attest.Logs, writer *os.File, whole []byte) {
	t.Helper()
	m := tpmtest.New(t, phased())
	whole, err := os.ReadFile(m.UserspaceLog())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "tpm2-measure.log")
	replaceFile(t, path, []byte(half))
	writer, err = os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { writer.Close() })
	if err := unix.Flock(int(writer.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return attest.Logs{Firmware: m.EventLog(), Userspace: path}, writer, whole
}

// TestUserspaceLogIsReadWhole: a reader waits for the writer's lock.
func TestUserspaceLogIsReadWhole(t *testing.T) {
	logs, writer, whole := writing(t)
	read := make(chan error, 1)
	var log *eventlog.Log
	go func() {
		var err error
		log, err = logs.Read()
		read <- err
	}()
	select {
	case err := <-read:
		t.Fatalf("it was read while it was written: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if _, err := writer.WriteAt(whole, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(writer.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(whole), "\x1e"); n == 0 || string(log.Events[len(log.Events)-1].UntrustedData) != "ready" {
		t.Errorf("%d records, the last event is %+v", n, log.Events[len(log.Events)-1])
	}
}

// TestLockedForGood: the wait ends, with a message that says what to do.
func TestLockedForGood(t *testing.T) {
	logs, _, _ := writing(t)
	begin := time.Now()
	_, err := logs.Read()
	if err == nil || !strings.Contains(err.Error(), "locked for 2s by another process") || !strings.Contains(err.Error(), "try again") {
		t.Error(err)
	}
	if took := time.Since(begin); took < time.Second || took > 2*time.Minute {
		t.Errorf("it took %s", took)
	}
}

// TestReadersShareTheLock: two kleidi processes do not wait for each other, and the
// lock ends with the reading.
func TestReadersShareTheLock(t *testing.T) {
	logs, writer, whole := writing(t)
	if _, err := writer.WriteAt(whole, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(writer.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	if _, err := logs.Read(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(writer.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("a lock is left behind: %v", err)
	}
}

// TestIncompleteUserspaceLog: systemd's mark of an interrupted writer is believed.
func TestIncompleteUserspaceLog(t *testing.T) {
	m := tpmtest.New(t, phased())
	logs := attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}
	if err := os.Chmod(logs.Userspace, 0o600|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if _, err := logs.Read(); err == nil || !strings.Contains(err.Error(), "marked as incomplete") {
		t.Error(err)
	}
	m.Reboot(simboot.Baseline(simboot.UKI))
	if _, err := logs.Read(); err != nil {
		t.Errorf("without a userspace log: %v", err)
	}
}
