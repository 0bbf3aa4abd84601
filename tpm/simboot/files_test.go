package simboot_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/predict"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

func filesOf(t *testing.T, b simboot.Boot) *simboot.Files {
	t.Helper()
	f, err := b.Files()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func predicted(f *simboot.Files) predict.Files {
	return predict.Files{UKI: f.UKI, Kernel: f.Kernel, Initrd: f.Initrd, GRUBConfig: f.GRUBConfig}
}

func readLogs(t *testing.T, m *tpmtest.Machine) *eventlog.Log {
	t.Helper()
	log, err := attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}.Read()
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// TestPredicted: from the log of one boot and the files of another, package predict
// computes the other's log to the last byte.
func TestPredicted(t *testing.T) {
	const uki, grub, stub = simboot.UKI, simboot.GRUB, simboot.EFIStub
	everywhere := []simboot.Loader{uki, grub, stub}
	for _, c := range []struct {
		name    string
		loaders []simboot.Loader
		edit    func(*simboot.Boot)
	}{
		{"kernel", everywhere, func(b *simboot.Boot) { b.Kernel = "6.13.1-amd64" }},
		{"initrd", everywhere, func(b *simboot.Boot) { b.Initrd = "dracut 107" }},
		{"command line", everywhere, func(b *simboot.Boot) { b.CommandLine += " mitigations=off" }},
		{"all of it", everywhere, func(b *simboot.Boot) { b.Kernel, b.Initrd, b.CommandLine = "6.14.2", "other", "root=/dev/sda1 rw" }},
		{"loader", []simboot.Loader{uki}, func(b *simboot.Boot) { b.LoaderVersion = "252.39-1~deb12u1" }},
	} {
		for _, l := range c.loaders {
			for secure, phases := range map[bool]string{true: simboot.AllPhases, false: ""} {
				base := simboot.Baseline(l)
				base.Keys, base.SecureBoot, base.Phases = "Example Computers", secure, phases
				next := base
				c.edit(&next)
				t.Run(fmt.Sprintf("%s,%s,secure boot=%t", c.name, l, secure), func(t *testing.T) { comesTrue(t, base, next) })
			}
		}
	}
}

func comesTrue(t *testing.T, base, next simboot.Boot) {
	t.Helper()
	m := tpmtest.New(t, base)
	change := predict.Change{Next: predicted(filesOf(t, next)), Running: predicted(filesOf(t, base)), PCRs: []int{4, 7, 8, 9, 11}}
	if base.Loader == simboot.EFIStub {
		change.Next.CommandLine, change.Running.CommandLine = &next.CommandLine, &base.CommandLine
	}
	got, err := predict.Predict(readLogs(t, m), change)
	if err != nil {
		t.Fatal(err)
	}
	m.Reboot(next)
	same(t, got, readLogs(t, m))
}

// same compares logs event by event.
func same(t *testing.T, got, want *eventlog.Log) {
	t.Helper()
	if len(got.Events) != len(want.Events) {
		t.Fatalf("%d events were predicted, %d came", len(got.Events), len(want.Events))
	}
	for i := range want.Events {
		if !reflect.DeepEqual(got.Events[i], want.Events[i]) {
			t.Errorf("event %d:\npredicted %+v\n     came %+v", i, got.Events[i], want.Events[i])
		}
	}
}

// TestDbxPredicted: both the variable's next content and a signed update of it
// lead to the next boot.
func TestDbxPredicted(t *testing.T) {
	base := simboot.Baseline(simboot.UKI)
	next := base
	next.Dbx += ",2026-02-10,2026-09-08"
	m := tpmtest.New(t, base)
	log := readLog(t, m)
	m.Reboot(next)
	for _, file := range [][]byte{filesOf(t, next).Dbx, filesOf(t, next).DbxUpdate} {
		got, err := predict.Predict(log, predict.Change{Dbx: file})
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, readLog(t, m))
	}
}

// TestWrongKeysAreNotPredicted: with Secure Boot, the signer of the next image matters.
func TestWrongKeysAreNotPredicted(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	evil := simboot.Baseline(simboot.UKI)
	evil.Keys = "Mallory"
	_, err := predict.Predict(readLog(t, m), predict.Change{Next: predicted(filesOf(t, evil))})
	if err == nil || !strings.Contains(err.Error(), "no authority of the running boot signed the new image") {
		t.Error(err)
	}
}

// TestFilesAreWritten: the folder of a machine holds the files of its last boot.
func TestFilesAreWritten(t *testing.T) {
	b := simboot.Baseline(simboot.GRUB)
	m := tpmtest.New(t, b)
	names := func() (names []string) {
		entries, err := os.ReadDir(m.Files())
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	if got, want := names(), []string{"dbx.esl", "dbxupdate.bin", "grub.cfg", "initrd.img", "vmlinuz"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	raw, err := os.ReadFile(filepath.Join(m.Files(), simboot.InitrdName))
	if err != nil || !bytes.Equal(raw, filesOf(t, b).Initrd) {
		t.Errorf("the initrd is another one: %v", err)
	}
	m.Reboot(simboot.Baseline(simboot.UKI))
	if got, want := names(), []string{"dbx.esl", "dbxupdate.bin", "uki.efi"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
