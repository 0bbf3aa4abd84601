package prune

import (
	"bytes"
	"cmp"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// rotated returns a keyring with a retired KEK, and that KEK's ID.
func rotated(t *testing.T, slots ...seal.Slot) (*keyring.Keyring, seal.KeyID) {
	t.Helper()
	k, err := keyring.New(seal.ClusterID{1}, newKEK(t), slots, []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	staged, err := k.Stage(newKEK(t), slots, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { staged.Close() })
	active, err := staged.Activate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { active.Close() })
	return active, k.CurrentID()
}

// archived returns the archive of a KEK, by the present keyring.
func archived(t *testing.T, k *keyring.Keyring, id seal.KeyID) []byte {
	t.Helper()
	b, err := makeArchive(t.Context(), &node.Node{}, k, id)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestCheck: each part of the proof is needed.
func TestCheck(t *testing.T) {
	k, old := rotated(t, recoverySlot(t))
	good := admin.PruneRequest{KeyID: old, Archive: archived(t, k, old)}
	all := func(k *keyring.Keyring, encrypted seal.KeyID, req admin.PruneRequest) error {
		return cmp.Or(checkKEK(k, req.KeyID), checkEncrypted(k, encrypted), check(k, req))
	}
	if err := all(k, k.CurrentID(), good); err != nil {
		t.Errorf("with the whole proof: %v", err)
	}
	turning, err := k.Stage(newKEK(t), k.Slots(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer turning.Close()
	later, err := turning.Activate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer later.Close()
	other, otherOld := rotated(t, recoverySlot(t))
	widened, err := k.WithSlots(append(k.Slots(), recoverySlot(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer widened.Close()
	changed := bytes.Replace(good.Archive, []byte("A"), []byte("B"), 1)
	for name, tc := range map[string]struct {
		k         *keyring.Keyring
		encrypted seal.KeyID
		req       admin.PruneRequest
		want      string
	}{
		"current":           {k, k.CurrentID(), admin.PruneRequest{KeyID: k.CurrentID(), Archive: good.Archive}, "does not belong to a retired KEK"},
		"unknown":           {k, k.CurrentID(), admin.PruneRequest{KeyID: "k1-x", Archive: good.Archive}, "does not belong to a retired KEK"},
		"silent":            {k, "", good, "restart kube-apiserver"},
		"coasting":          {k, old, good, "wait three minutes"},
		"no archive":        {k, k.CurrentID(), admin.PruneRequest{KeyID: old}, "this is no archive of the KEK"},
		"changed":           {k, k.CurrentID(), admin.PruneRequest{KeyID: old, Archive: changed}, "this is no archive of the KEK"},
		"another cluster's": {k, k.CurrentID(), admin.PruneRequest{KeyID: old, Archive: archived(t, other, otherOld)}, "made under a KEK that this keyring does not hold"},
		"another KEK's":     {later, later.CurrentID(), admin.PruneRequest{KeyID: old, Archive: archived(t, later, k.CurrentID())}, "it is the archive of key ID"},
		"before a rotation": {later, later.CurrentID(), good, "it was made before the last rotation"},
		"other recipients":  {widened, k.CurrentID(), good, "recovery recipients differ"},
		"staged":            {turning, turning.CurrentID(), good, "finish it with kleidi rotate, or end it with kleidi rotate --abort"},
	} {
		if err := all(tc.k, tc.encrypted, tc.req); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	bare, bareOld := rotated(t, seal.Slot{Type: seal.TypeTPM, Node: "cp-1", Data: []byte("{}")})
	if _, err := makeArchive(t.Context(), &node.Node{}, bare, bareOld); err == nil || !strings.Contains(err.Error(), "no recovery slot") {
		t.Errorf("without a recovery slot: %v", err)
	}
}

func TestKeep(t *testing.T) {
	path := filepath.Join(t.TempDir(), "archive.json")
	if err := os.WriteFile(path+".new", []byte("{"), 0o600); err != nil { // an interrupted write
		t.Fatal(err)
	}
	for _, archive := range []string{"first", "second"} { // the second time, the file exists
		if b, err := Keep(path, []byte(archive)); err != nil || string(b) != "first" {
			t.Fatalf("%s, %v", b, err)
		}
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
	if _, err := Keep(filepath.Join(t.TempDir(), "none", "a.json"), nil); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
}

func newKEK(t *testing.T) *seal.Secret {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	return kek
}

// recoverySlot is a slot for a fresh recipient. What it wraps is not the keyring's KEK.
func recoverySlot(t *testing.T) seal.Slot {
	t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	w, err := recovery.NewWrapper(seal.Memory{}, []string{identity.Recipient().String()})
	if err != nil {
		t.Fatal(err)
	}
	kek := newKEK(t)
	defer kek.Close()
	s, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
