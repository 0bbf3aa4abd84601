package site

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// NewTPM returns the TPM's wrapper on a separate machine, in this process.
func NewTPM(t testing.TB) (*tpm.Wrapper, *tpmtest.Machine) {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	w := TPM(t, m, "alpha")
	if _, err := w.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w, m
}

// TPM returns the wrapper of a machine's TPM in kleidi's own configuration.
func TPM(t testing.TB, m *tpmtest.Machine, node string) *tpm.Wrapper {
	t.Helper()
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	gate := &attest.Gate{Attester: attest.Attester{Device: m.TPM(), Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}},
		Counter: counter, Bank: crypto.SHA256}
	return tpm.NewWrapper(tpm.Config{Device: m.TPM(), Node: node, Counter: counter,
		State: func(ctx context.Context) (tpm.BootState, error) { return gate.State(ctx) }})
}

// Pair returns a wrapper that opens a KEK only with a TPM and another wrapper together.
func Pair(first *tpm.Wrapper, second both.Part) *both.Wrapper {
	return &both.Wrapper{Kind: "tpm-and-" + second.Type(), Node: first.Node, First: first, Second: second}
}

// wraps is the number of wraps that must leave nothing behind.
const wraps = 10_000

// left counts what wraps could leave behind in the process; pages is resident memory in
// steps of 16 MiB.
type left struct{ goroutines, files, secrets, pages int }

func count() (l left, err error) {
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return l, err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return l, err
	}
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return l, err
	}
	var size, resident int
	_, err = fmt.Sscan(string(statm), &size, &resident)
	return left{runtime.NumGoroutine(), len(files), strings.Count(string(maps), "secretmem"), resident * os.Getpagesize() >> 24}, err
}

// NothingLeft wraps 10,000 times as a rotation does. No goroutine, file, connection,
// locked page or session of the TPM may be left.
func NothingLeft(t *testing.T, w *both.Wrapper) {
	t.Helper()
	kek, err := w.Memory.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	opens := func() {
		t.Helper()
		got, err := w.Unwrap(t.Context(), slot)
		if err != nil {
			t.Fatal(err)
		}
		defer got.Close()
		if !got.Equal(kek) {
			t.Error("it opens to another KEK")
		}
	}
	opens()
	debug.FreeOSMemory()
	before, err := count()
	if err != nil {
		t.Fatal(err)
	}
	for range wraps {
		if _, err := w.WrapLike(t.Context(), kek, slot); err != nil {
			t.Fatal(err)
		}
	}
	opens() // the TPM must also have room for its sessions and objects
	debug.FreeOSMemory()
	node.Eventually(t, notices, "nothing is left", func() error {
		after, err := count()
		if after.goroutines > before.goroutines || after.files > before.files || after.secrets > before.secrets || after.pages > before.pages+1 {
			err = errors.Join(err, fmt.Errorf("%+v; before: %+v", after, before))
		}
		return err
	})
}

// Secrets returns the KEK in a slot of two wrappers, and the two shares of it.
func Secrets(t *testing.T, w *both.Wrapper, slot seal.Slot) map[string][]byte {
	t.Helper()
	first, second, err := both.Parts(slot)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]byte{}
	for name, open := range map[string]func() (*seal.Secret, error){
		"KEK":                         func() (*seal.Secret, error) { return w.Unwrap(t.Context(), slot) },
		"share of " + w.First.Type():  func() (*seal.Secret, error) { return w.First.Unwrap(t.Context(), first) },
		"share of " + w.Second.Type(): func() (*seal.Secret, error) { return w.Second.Unwrap(t.Context(), second) },
	} {
		s, err := open()
		if err != nil {
			t.Fatal(err)
		}
		s.With(func(b []byte) { all[name] = append([]byte(nil), b...) })
		s.Close()
	}
	return all
}
