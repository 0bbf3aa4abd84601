package simboot_test

import (
	"bytes"
	"crypto"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// shape is the log without contents: PCRs and types in their order, and the
// digests of what is the same on every machine. How many boot options there are,
// and how many commands and files GRUB has, is left out.
func shape(log *eventlog.Log) []string {
	var lines []string
	name := true // PCR 11: a section's name, then its content
	for _, e := range log.Events {
		line := fmt.Sprintf("PCR %d %s", e.PCR, e.UntrustedType)
		switch {
		case e.UntrustedType == eventlog.Separator, e.UntrustedType == eventlog.EFIAction:
			line += fmt.Sprintf(" %x", e.Digest(crypto.SHA256))
		case e.PCR == 11:
			if name {
				line += fmt.Sprintf(" %x", e.Digest(crypto.SHA256))
			}
			name = !name
		case e.PCR == 8 || e.PCR == 9 && e.UntrustedType == eventlog.IPL:
			line = "GRUB's commands and files"
		}
		lines = append(lines, line)
	}
	return slices.Compact(lines)
}

// TestLikeRecordedBoots: a simulated log has the shape of a recorded one.
func TestLikeRecordedBoots(t *testing.T) {
	uki := simboot.Baseline(simboot.UKI)
	uki.LoaderVersion = "252.39" // which measures fewer sections than later ones
	for folder, b := range map[string]simboot.Boot{"uki-secureboot": uki, "shim-grub-secureboot": simboot.Baseline(simboot.GRUB)} {
		raw, err := os.ReadFile(filepath.Join("..", "eventlog", "testdata", folder, "binary_bios_measurements"))
		if err != nil {
			t.Fatal(err)
		}
		recorded, err := eventlog.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		got, want := shape(readLog(t, tpmtest.New(t, b))), shape(recorded)
		if !slices.Equal(got, want) {
			t.Errorf("%s:\n got %q\nwant %q", b.Loader, got, want)
		}
	}
}

// TestSameBootSameLog: a boot's log follows from the boot alone.
func TestSameBootSameLog(t *testing.T) {
	b := simboot.Baseline(simboot.GRUB)
	b.Phases = simboot.AllPhases
	m := tpmtest.New(t, b)
	read := func() (all []byte) {
		for _, path := range []string{m.EventLog(), m.UserspaceLog()} {
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, raw...)
		}
		return all
	}
	was := read()
	m.Reboot(b)
	if !bytes.Equal(was, read()) {
		t.Error("the logs of two equal boots differ")
	}
}
