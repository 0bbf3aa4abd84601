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

func printed(f func(io.Writer)) string {
	var b strings.Builder
	f(&b)
	return b.String()
}

// TestState: the lines of a keyring, and one line for each change.
func TestState(t *testing.T) {
	s := admin.KeyringState{CurrentKeyID: "k1-b", Former: "k1-a", Revision: 3, Changes: []string{"one", "two"}}
	want := "current key ID  k1-b\nformer key ID   k1-a\nrevision        3\n- one\n- two\n"
	if got := printed(func(w io.Writer) { State(w, s) }); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestError: the details and the hint of a refusal are on separate lines.
func TestError(t *testing.T) {
	err := seal.Errorf(seal.CauseBootState, "do this", "PCR 4 differs")
	if got := printed(func(w io.Writer) { Error(w, err) }); got != "error: PCR 4 differs; do this\n" {
		t.Errorf("%q", got)
	}
	if got, want := printed(func(w io.Writer) {
		problem(w, &admin.Problem{Message: "refused", Details: []string{"a", "b"}, Hint: "do this"})
	}),
		strings.ReplaceAll("_refused:\n_a\n_b\n_-> do this\n", "_", strings.Repeat(" ", 17)); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestOpens: the words after a slot.
func TestOpens(t *testing.T) {
	yes, no := true, false
	next := slotview.UseNames[tpm.UseNext]
	for want, s := range map[string]admin.SlotReport{
		"":                                   {},
		"(not tried; kleidi slot test does)": {NotTried: true},
		"(opens now)":                        {Opens: &yes},
		"(for the next boot)":                {Opens: &no, Use: next},
		"(DOES NOT OPEN)":                    {Opens: &no},
	} {
		if got := opens(s); got != want {
			t.Errorf("%+v: %q, want %q", s, got, want)
		}
	}
	if got := opens(admin.SlotReport{Opens: &no, Use: next, Problem: &admin.Problem{}}); got != "(DOES NOT OPEN)" {
		t.Errorf("a slot for the next boot with a problem: %q", got)
	}
}

// TestKeys: several retired KEKs take one line, which names the oldest.
func TestKeys(t *testing.T) {
	day := func(d int) time.Time { return time.Date(2026, 1, d, 12, 0, 0, 0, time.Local) }
	all := []admin.KeyReport{{KeyID: "k1-c", Role: "current", Created: day(3)}, {KeyID: "k1-b", Role: "retired", Created: day(2)}, {KeyID: "k1-a", Role: "retired", Created: day(1)}}
	for n, want := range map[int]string{1: "", 2: "retired KEK    k1-b  made 2026-01-02 12:00:00\n", 3: "retired KEKs   2, the oldest made 2026-01-01 12:00:00 (kleidi keyring show lists them)\n"} {
		if got := printed(func(w io.Writer) { keys(w, all[:n]) }); got != "current KEK    k1-c  made 2026-01-03 12:00:00\n"+want {
			t.Errorf("%d KEKs: %q", n, got)
		}
	}
}

// TestSlots: a missing slot shows its remedy, and an empty cell is a dash.
func TestSlots(t *testing.T) {
	got := printed(func(w io.Writer) {
		Slots(w, []admin.SlotReport{{Name: "vault", Type: seal.TypeSkipped, Binding: "left out", Problem: &admin.Problem{Hint: "add it"}}})
	})
	if want := "NAME   NODE  FOR  WRAPPED BY\nvault  -     -    left out; add it\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestPacketFilter: only an address beyond the loopback needs a rule.
func TestPacketFilter(t *testing.T) {
	for server, want := range map[string]string{"https://127.0.0.1:6443": "", "https://localhost:6443": "", "https://[::1]:6443": "",
		"https://10.0.0.1:6443": "IPAddressAllow=10.0.0.1\\n", "https://api.example:6443": "with --server, or allow it with IPAddressAllow=\n"} {
		if got := packetFilter(server); want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%s: %q", server, got)
		}
	}
}
