package slotrecord

import (
	"bytes"
	"context"
	"io/fs"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// disk is a File in memory, which may refuse to be written.
type disk struct {
	b    []byte
	full bool
}

func (d *disk) Load(context.Context) ([]byte, store.Version, error) {
	if d.b == nil {
		return nil, "", fs.ErrNotExist
	}
	return d.b, store.Version(d.b), nil
}

func (d *disk) Save(_ context.Context, b []byte, old store.Version) (store.Version, error) {
	if d.full {
		return "", fs.ErrPermission
	}
	if string(old) != string(d.b) {
		return "", store.ErrConflict
	}
	d.b = b
	return store.Version(b), nil
}

// process starts a serve or a command with the record of a disk, and returns its log.
func process(d *disk) (*Record, *bytes.Buffer) {
	log := &bytes.Buffer{}
	return New(d, slotview.Reader{Node: "cp-1"}, slog.New(slog.NewTextHandler(log, nil))), log
}

func slotsOf(types ...string) (all []seal.Slot) {
	for _, t := range types {
		all = append(all, seal.Slot{Type: t, Data: []byte(`{"mount":"transit"}`)})
	}
	return all
}

func keyringOf(t *testing.T, types ...string) *keyring.Keyring {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	k, err := keyring.New(seal.ClusterID{1}, kek, slotsOf(types...), []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func with(t *testing.T, k *keyring.Keyring, types ...string) *keyring.Keyring {
	t.Helper()
	next, err := k.WithSlots(slotsOf(types...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { next.Close() })
	return next
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func outside(t *testing.T, r *Record, k *keyring.Keyring) string {
	t.Helper()
	return strings.Join(r.Outside(t.Context(), k.ClusterID().String(), k.Slots()).Describe(), "; ")
}

// TestOutside: a change by a command of this node is on record, even if the process died
// before the end of the change. Any other change is announced at each start until
// somebody confirms it.
func TestOutside(t *testing.T) {
	d := &disk{}
	k := keyringOf(t, "a", "b")
	r, log := process(d)
	must(t, r.Begin(t.Context(), k))
	r.Opened(t.Context(), k)
	if got := outside(t, r, k); got != "" || log.Len() > 0 {
		t.Errorf("nothing has changed: %s\n%s", got, log)
	}

	byCommand := with(t, k, "a", "b", "c")
	must(t, r.Changing(t.Context(), unlock.SlotChange{Before: k, After: byCommand}))
	for saved, now := range map[string]*keyring.Keyring{"before the save": k, "after the save": byCommand} {
		died, log := process(&disk{b: d.b})
		died.Opened(t.Context(), now)
		if got := outside(t, died, now); got != "" || log.Len() > 0 {
			t.Errorf("died %s: %s\n%s", saved, got, log)
		}
	}
	r.Changed(t.Context())
	r, log = process(d)
	r.Opened(t.Context(), byCommand)
	if got := outside(t, r, byCommand); got != "" || log.Len() > 0 {
		t.Errorf("after a command: %s\n%s", got, log)
	}

	planted := with(t, byCommand, "a", "c", "evil")
	for range 2 { // the first start does not accept it as known
		r, log = process(d)
		r.Opened(t.Context(), planted)
		if got := outside(t, r, planted); got != "added evil: ; removed b: " {
			t.Errorf("outside: %q", got)
		}
		if !strings.Contains(log.String(), "changed from outside") || !strings.Contains(log.String(), "evil") {
			t.Errorf("log: %s", log)
		}
	}
	// A command that makes another change does not confirm it.
	after := with(t, planted, "a", "c", "evil", "d")
	must(t, r.Changing(t.Context(), unlock.SlotChange{Before: planted, After: after}))
	r.Changed(t.Context())
	if got := outside(t, r, after); got != "added evil: ; removed b: " {
		t.Errorf("after a command beside it: %q", got)
	}
	r.Confirm(after)
	if got := outside(t, r, after); got != "" {
		t.Errorf("confirmed: %q", got)
	}
}

// TestNoRecord: without a record the slots are taken as they are, and listed.
func TestNoRecord(t *testing.T) {
	for name, d := range map[string]*disk{"none": {}, "of another cluster": {b: []byte(`{"version":1,"clusterID":"other"}`)}} {
		r, log := process(d)
		k := keyringOf(t, "a")
		r.Opened(t.Context(), k)
		if got := outside(t, r, k); got != "" || !strings.Contains(log.String(), "there was no record of the slots") {
			t.Errorf("%s: %s\n%s", name, got, log)
		}
		if !strings.Contains(string(d.b), `"slot":"a: "`) {
			t.Errorf("%s: not recorded: %s", name, d.b)
		}
	}
}

// TestUnreadable: if the record can't be read, no slot is known.
func TestUnreadable(t *testing.T) {
	for _, b := range []string{"{", `{"version":2}`} {
		r, log := process(&disk{b: []byte(b)})
		k := keyringOf(t, "a")
		r.Opened(t.Context(), k)
		if got := outside(t, r, k); got != "added a: " || !strings.Contains(log.String(), "can't be read") {
			t.Errorf("%s: %q\n%s", b, got, log)
		}
	}
}

// TestNotSaved: a change whose record can't be saved is not made.
func TestNotSaved(t *testing.T) {
	d := &disk{}
	r, _ := process(d)
	k := keyringOf(t, "a")
	must(t, r.Begin(t.Context(), k))
	d.full = true
	if err := r.Changing(t.Context(), unlock.SlotChange{Before: k, After: with(t, k, "a", "b")}); seal.CauseOf(err) != seal.CauseStore {
		t.Errorf("want store-failed: %v", err)
	}
	// A change that leaves the slots unchanged needs no record.
	r, _ = process(&disk{b: d.b, full: true})
	r.Opened(t.Context(), k)
	must(t, r.Changing(t.Context(), unlock.SlotChange{Before: k, After: with(t, k, "a")}))
}
