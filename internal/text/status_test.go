package text

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
)

// renders compares the lines that f prints with the wanted ones.
func renders(t *testing.T, name string, f func(io.Writer), want ...string) {
	t.Helper()
	got := strings.Split(strings.TrimSuffix(printed(f), "\n"), "\n")
	for i := range max(len(got), len(want)) {
		switch {
		case i >= len(got):
			t.Errorf("%s: line %q is missing", name, want[i])
		case i >= len(want):
			t.Errorf("%s: unwanted line %q", name, got[i])
		case got[i] != want[i]:
			t.Errorf("%s: line %q, want %q", name, got[i], want[i])
		}
	}
}

func at(day int) time.Time { return time.Date(2026, 1, day, 12, 0, 0, 0, time.Local) }

// TestStatus: the whole report of a node to which everything happened at once. The state
// and its problem come first.
func TestStatus(t *testing.T) {
	yes, no, boots := true, false, int64(2)
	refusal := &admin.Problem{Cause: seal.CauseBootState, Message: "the boot state differs", Details: []string{"PCR 4", "PCR 11"}, Hint: "run kleidi recover"}
	r := admin.StatusReport{
		Version: "v1", Node: "cp-1", State: admin.Open, Since: at(1), Problem: refusal, ClusterID: "c1", Revision: 7, Wrapper: seal.TypeVault,
		NextAttempt: at(2),
		Suspension:  &admin.Suspension{Binding: "PCR 7", BootsLeft: &boots},
		Fallback:    &admin.Problem{Message: "the TPM is gone"},
		Keys:        []admin.KeyReport{{KeyID: "k1-a", Role: "current", Created: at(1)}},
		Staged:      &admin.Problem{Message: "the staged KEK is not open"},
		Attestation: &admin.AttestationReport{Boot: "uki", PCRs: []int{4, 11}, Bank: "sha256", Problem: refusal},
		Slots: []admin.SlotReport{
			{Name: "tpm", Type: seal.TypeTPM, Use: slotview.UseNames[tpm.UsePresent], Binding: "PCR 4", Opens: &no, Problem: refusal},
			{Name: "tpm-2", Type: seal.TypeTPM, Use: slotview.UseNames[tpm.UseNext], Binding: "PCR 4", Opens: &no},
			{Name: "vault", Type: seal.TypeVault, Binding: "key kleidi", Opens: &yes},
			{Name: "pkcs11", Type: seal.TypeSkipped, Binding: "left out", Problem: &admin.Problem{Message: "a rotation skipped it", Hint: "add it"}},
		},
		Unrevoked:      []admin.Unrevoked{{Message: "copies open", Since: at(3), Hint: "clear the TPM"}},
		ChangedOutside: []admin.OutsideChange{{Change: "added", Slot: "recovery age1x"}},
		Memory:         "secret", TPMOpenTo: "group tss",
	}
	const pad = "                 "
	renders(t, "a report", func(w io.Writer) { Status(w, r) },
		"state          open since 2026-01-01 12:00:00",
		pad+"the boot state differs:", pad+"PCR 4", pad+"PCR 11", pad+"-> run kleidi recover",
		"SUSPENDED      "+r.Suspension.String(),
		"FALLBACK       opened by vault, because no wrapper before it in unlock.order opened it:",
		pad+"the TPM is gone",
		"node           cp-1",
		"cluster ID     c1",
		"revision       7",
		"current KEK    k1-a  made 2026-01-01 12:00:00",
		pad+"the staged KEK is not open",
		"attestation    failed: uki boot, PCR 4, 11 (sha256)",
		"slot           tpm  PCR 4  (DOES NOT OPEN)",
		"slot           tpm ("+slotview.UseNames[tpm.UseNext]+")  PCR 4  (for the next boot)",
		"slot           vault  key kleidi  (opens now)",
		"slot           pkcs11  left out",
		pad+"a rotation skipped it", pad+"-> add it",
		"NOT REVOKED    copies open, since 2026-01-03 12:00:00",
		pad+"-> clear the TPM",
		"NOT BY KLEIDI  added: recovery age1x",
		pad+"-> "+slotview.HintOutside,
		"memory         secret",
		"TPM OPEN TO    group tss",
		pad+"-> with a copy of the keyring, these users can get the KEK: see docs/threat-model.md",
		"version        v1",
	)
}

// TestStatusRepeatsNoProblem: a problem of the attestation or of a slot has lines of its
// own only if it differs from the problem of the node.
func TestStatusRepeatsNoProblem(t *testing.T) {
	one, two := admin.Problem{Message: "first"}, admin.Problem{Message: "second"}
	same := one
	for name, row := range map[string]struct {
		node        *admin.Problem
		other       *admin.Problem
		first, both int // how often the two messages appear
	}{
		"the same":     {&one, &same, 1, 0},
		"another":      {&one, &two, 1, 2},
		"none of node": {nil, &two, 0, 2},
	} {
		got := printed(func(w io.Writer) {
			Status(w, admin.StatusReport{Problem: row.node, Attestation: &admin.AttestationReport{Problem: row.other}, Slots: []admin.SlotReport{{Problem: row.other}}})
		})
		if n := strings.Count(got, "first"); n != row.first {
			t.Errorf("%s: the problem of the node stands %d times:\n%s", name, n, got)
		}
		if n := strings.Count(got, "second"); n != row.both {
			t.Errorf("%s: the other problem stands %d times:\n%s", name, n, got)
		}
	}
}

// TestNextAttempt: only a locked node tries again.
func TestNextAttempt(t *testing.T) {
	for state, want := range map[admin.State]bool{admin.Locked: true, admin.Open: false} {
		got := printed(func(w io.Writer) { Status(w, admin.StatusReport{State: state, NextAttempt: at(2)}) })
		if strings.Contains(got, "next attempt   2026-01-02 12:00:00\n") != want {
			t.Errorf("%s:\n%s", state, got)
		}
	}
}

// TestManyRetired: an operator hears of the limit of retired KEKs before it is reached.
func TestManyRetired(t *testing.T) {
	for n, want := range map[int]bool{slotview.ManyRetired - 1: false, slotview.ManyRetired: true, slotview.MostRetired: true} {
		all := make([]admin.KeyReport, n)
		for i := range all {
			all[i] = admin.KeyReport{Role: "retired", Created: at(1)}
		}
		if got := printed(func(w io.Writer) { keys(w, all) }); strings.Contains(got, "run kleidi prune KEYID") != want {
			t.Errorf("%d retired KEKs: %q", n, got)
		}
	}
}

// TestSlotTests: the verdict on each slot, and a warning's remedy on a line of its own.
func TestSlotTests(t *testing.T) {
	r := admin.SlotTests{Slots: []admin.SlotTest{
		{Name: "tpm", Opens: true, Duration: 1500 * time.Microsecond},
		{Name: "tpm-2", ForNextBoot: true, Duration: time.Second},
		{Name: "vault", Duration: time.Minute, Problem: &admin.Problem{Message: "refused", Hint: "ask"}, Warnings: []string{"the key may be deleted; forbid it; then go on"}},
	}}
	const pad = "                 "
	renders(t, "slot test", func(w io.Writer) { SlotTests(w, r) },
		"tpm            opens (2ms)",
		"tpm-2          for the next boot (1s)",
		"vault          DOES NOT OPEN (1m0s)",
		pad+"refused", pad+"-> ask",
		pad+"the key may be deleted", pad+"-> forbid it; then go on",
	)
}
