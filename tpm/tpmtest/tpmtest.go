// Package tpmtest gives tests a machine with a TPM that has booted, and a TPM that
// fails: a [Proxy] in front of the TPM hangs, vanishes, answers garbage or a chosen
// response code, and records the traffic on the bus.
package tpmtest

import (
	"os"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// Machine is a simulated machine that ends with its test.
type Machine struct {
	*simboot.Machine
	t testing.TB
}

// New returns a machine with a new TPM that has booted b.
func New(t testing.TB, b simboot.Boot) *Machine {
	t.Helper()
	m := Attach(t, tempDir(t))
	m.Reboot(b)
	return m
}

// Attach returns the machine in dir; the machine is off.
func Attach(t testing.TB, dir string) *Machine {
	t.Helper()
	m, err := simboot.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.PowerOff(); err != nil {
			t.Error(err)
		}
	})
	return &Machine{Machine: m, t: t}
}

// tempDir makes a folder with a short path for sockets; the path of t.TempDir is too
// long.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Reboot boots b, or fails the test.
func (m *Machine) Reboot(b simboot.Boot) {
	m.t.Helper()
	if err := m.Boot(m.t.Context(), b); err != nil {
		m.t.Fatal(err)
	}
}

// TPM returns the machine's TPM.
func (m *Machine) TPM() *device.Device { return Device(m.t, m.Device(), 2*time.Minute) }

// Device returns the TPM at address, whose operations end after timeout
// (0: device.DefaultTimeout).
func Device(t testing.TB, address string, timeout time.Duration) *device.Device {
	t.Helper()
	a, err := device.ParseAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	return device.New(a, timeout)
}
