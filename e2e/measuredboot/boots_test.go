package measuredboot

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
)

// verdict is the result of a boot.
type verdict string

const (
	opens      verdict = "opens"
	locked     verdict = "locked"
	notStarted verdict = "not started by the firmware"
)

// boot is one boot of a machine, with its expected result.
type boot struct {
	what  string
	image image
	// before changes the machine while it is off.
	before func(*machine)
	files  []disk.File
	// first runs before kleidi serves, then while it serves.
	first, then []wire.Step
	// last runs after these. It is a function because its steps depend on the machine's
	// state.
	last func(*machine) []wire.Step
	want verdict
	// cause is the typed cause of the refusal, and says lists texts that the refusal
	// must contain. Both must be in the gRPC error and in the output of kleidi status.
	// slot is the cause that kleidi status reports for one of the slots, if it is
	// another one.
	cause, slot seal.Cause
	says        []string
	// moved are the PCRs that differ from the first boot, among those that kleidi may
	// seal to (4 to 9, 11 to 14).
	moved []int
	// refused is the message of a command that must fail; empty if no command must
	// fail.
	refused string
	// discard restores the state folder of before the boot, when the machine is off.
	discard bool
	check   func(*testing.T, *booted)
}

// series runs boots one after the other. The first boot makes the keyring.
func (m *machine) series(name string, boots []boot) {
	for n, c := range boots {
		if n == 0 {
			m.prepareFirst(&c)
		}
		row := row{Machine: name, Boot: c.what, Want: c.want}
		passed := m.t.Run(fmt.Sprintf("%02d %s", n+1, c.what), func(t *testing.T) { m.follow(t, c, &row) })
		if row.AsExpected = passed; !passed || row.Verdict != "" { // an empty verdict means that -run left the boot out
			report.add(row)
		}
		if !passed && n == 0 {
			m.t.Fatal("without its first boot, nothing can be told from the others")
		}
	}
}

// prepareFirst makes the first boot make a DEK seed.
func (m *machine) prepareFirst(c *boot) {
	m.seed = make([]byte, 32)
	rand.Read(m.seed)
	c.then = append([]wire.Step{{Encrypt: m.seed}}, c.then...)
}

func (m *machine) follow(t *testing.T, c boot, r *row) {
	t.Helper()
	if c.before != nil {
		c.before(m)
	}
	steps := append(slices.Clone(c.first), wire.Step{Serve: true})
	if m.under != nil {
		steps = append(steps, wire.Step{Decrypt: m.under})
	}
	steps = append(steps, c.then...)
	if c.last != nil {
		steps = append(steps, c.last(m)...)
	}
	steps = append(steps, wire.Step{Stop: true})
	state := m.state
	b, err := m.boot(c.image, c.files, steps...)
	if err != nil {
		t.Fatal(err)
	}
	if c.discard || !b.started {
		m.state = state
	}
	r.Seconds = b.took.Seconds()
	m.judge(t, c, b, r)
	if t.Failed() {
		t.Logf("the console:\n%s", tail(b.console, 40))
		for _, res := range b.results {
			t.Logf("%s", describe(res))
		}
	}
}

// describe shows a result without the event log.
func describe(r wire.Result) string {
	if r.Machine != nil {
		facts := *r.Machine
		facts.EventLog = nil
		r.Machine = &facts
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err.Error()
	}
	return strings.ReplaceAll(string(b), `\n`, "\n\t")
}

// judge compares the result of a boot with the expected one.
func (m *machine) judge(t *testing.T, c boot, b *booted, r *row) {
	t.Helper()
	if !b.started {
		r.Verdict, r.Says = notStarted, b.said
		if c.want != notStarted {
			t.Errorf("the firmware did not start it: %s", b.said)
		}
		return
	}
	m.judgeFacts(t, c, b, r)
	said := "" // by the command that must fail
	for _, res := range b.results[1:] {
		switch s := res.Step; {
		case s.Serve:
			judgeServe(t, c, res, r)
		case s.Encrypt != nil:
			if m.under, r.Made = res.Sealed, res.Sealed != nil; res.Sealed == nil {
				t.Errorf("Encrypt: %s", res.Error)
			}
		case s.Decrypt != nil:
			m.judgeDecrypt(t, c, res, r)
		case c.refused != "" && res.Error != "" && strings.Contains(res.Stderr, c.refused):
			said = strings.TrimSpace(res.Stderr[max(0, strings.LastIndex(res.Stderr, "error: ")):])
		case res.Error != "":
			t.Errorf("%s: %s", describe(wire.Result{Step: s}), res.Error)
		}
	}
	if c.refused != "" {
		if said == "" {
			t.Errorf("no command said %q", c.refused)
		}
		r.Says = strings.TrimPrefix(r.Says+"; "+said, "; ")
	}
	if r.Verdict == "" {
		t.Errorf("kleidi was not asked; expected that it %s", c.want)
	}
	if c.check != nil {
		c.check(t, b)
	}
}

// relevant are the PCRs that kleidi may seal to, without the firmware's own (0 to 3).
var relevant = []int{4, 5, 6, 7, 8, 9, 11, 12, 13, 14}

func (m *machine) judgeFacts(t *testing.T, c boot, b *booted, r *row) {
	t.Helper()
	facts := b.facts()
	if m.first == nil {
		m.first = facts
	}
	for _, n := range relevant {
		if facts.PCRs[n] != m.first.PCRs[n] {
			r.Moved = append(r.Moved, n)
		}
	}
	if !slices.Equal(r.Moved, c.moved) {
		t.Errorf("PCRs %v differ from the first boot, expected %v", r.Moved, c.moved)
	}
}

// judgeServe checks KMS v2's Status and the output of kleidi status, which must agree.
func judgeServe(t *testing.T, c boot, res wire.Result, r *row) {
	t.Helper()
	var status struct {
		State   string
		Problem admin.Problem
		Slots   []admin.SlotReport
	}
	if err := json.Unmarshal([]byte(res.Status), &status); err != nil {
		t.Errorf("kleidi status -o json: %v", err)
	}
	r.Verdict = locked
	if res.Error == "" {
		r.Verdict = opens
	}
	if r.Verdict != c.want {
		t.Errorf("it %s, and was expected: %s: %s", r.Verdict, c.want, res.Error)
	}
	if r.Verdict == opens {
		if res.Healthz != "ok" || res.KeyID == "" || status.State != "open" {
			t.Errorf("KMS v2 Status says healthz %q and key ID %q, kleidi status says %q", res.Healthz, res.KeyID, status.State)
		}
		return
	}
	r.Says = strings.TrimPrefix(res.Error, "rpc error: code = Unavailable desc = ")
	if status.State != "locked" || status.Problem.Hint == "" || status.Problem.Cause != c.cause {
		t.Errorf("kleidi status says %q because of %q, and advises %q; expected the cause %q", status.State, status.Problem.Cause, status.Problem.Hint, c.cause)
	}
	if !strings.Contains(res.Error, "locked ("+string(c.cause)+")") {
		t.Errorf("the gRPC error does not name the cause %q: %s", c.cause, res.Error)
	}
	if c.slot != "" && !slices.ContainsFunc(status.Slots, func(s admin.SlotReport) bool { return s.Problem != nil && s.Problem.Cause == c.slot }) {
		t.Errorf("kleidi status gives the cause %q for no slot: %s", c.slot, res.Status)
	}
	if c.slot != "" {
		r.Says += "; kleidi status says of a slot: " + string(c.slot)
	}
	for _, want := range c.says {
		if !strings.Contains(res.Error, want) {
			t.Errorf("the gRPC error does not say %q: %s", want, res.Error)
		}
		said := strings.Join(append(slices.Clone(status.Problem.Details), status.Problem.Message, status.Problem.Hint), "; ")
		if !strings.Contains(said, want) {
			t.Errorf("kleidi status does not say %q: %s", want, said)
		}
	}
}

// judgeDecrypt demands the DEK seed of the first boot, or nothing at all.
func (m *machine) judgeDecrypt(t *testing.T, c boot, res wire.Result, r *row) {
	t.Helper()
	r.Seed = bytes.Equal(res.Plain, m.seed)
	switch c.want {
	case opens:
		if !r.Seed {
			t.Errorf("the DEK seed of the first boot does not decrypt: %s", res.Error)
		}
	default:
		if res.Error == "" || len(res.Plain) > 0 {
			t.Errorf("a locked kleidi answers Decrypt with %d bytes", len(res.Plain))
		}
	}
}
