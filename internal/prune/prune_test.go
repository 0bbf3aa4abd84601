package prune

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// rotated returns a keyring with a retired KEK, and that KEK's ID.
func rotated(t *testing.T, slots ...seal.Slot) (*keyring.Keyring, seal.KeyID) {
	t.Helper()
	next := func() *seal.Secret {
		kek, err := seal.Memory{}.NewKEK()
		if err != nil {
			t.Fatal(err)
		}
		return kek
	}
	k, err := keyring.New(seal.ClusterID{1}, next(), slots, []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	staged, err := k.Stage(next(), slots, time.Now())
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

var recovery = seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}

// TestCheck: each part of the proof is needed.
func TestCheck(t *testing.T) {
	k, old := rotated(t, recovery)
	sum := sha256.Sum256(k.Marshal())
	good := admin.PruneRequest{KeyID: old, Archived: sum[:]}
	if err := check(k, k.CurrentID(), good); err != nil {
		t.Errorf("with the whole proof: %v", err)
	}
	bare, bareOld := rotated(t, seal.Slot{Type: seal.TypeTPM, Node: "cp-1", Data: []byte("{}")})
	bareSum := sha256.Sum256(bare.Marshal())
	for name, tc := range map[string]struct {
		k         *keyring.Keyring
		encrypted seal.KeyID
		req       admin.PruneRequest
		want      string
	}{
		"current":     {k, k.CurrentID(), admin.PruneRequest{KeyID: k.CurrentID(), Archived: sum[:]}, "is not that of a retired KEK"},
		"unknown":     {k, k.CurrentID(), admin.PruneRequest{KeyID: "k1-x", Archived: sum[:]}, "is not that of a retired KEK"},
		"silent":      {k, "", good, "restart kube-apiserver"},
		"coasting":    {k, old, good, "wait three minutes"},
		"no archive":  {k, k.CurrentID(), admin.PruneRequest{KeyID: old}, "the archive is no copy"},
		"other bytes": {k, k.CurrentID(), admin.PruneRequest{KeyID: old, Archived: bareSum[:]}, "the archive is no copy"},
		"no recovery": {bare, bare.CurrentID(), admin.PruneRequest{KeyID: bareOld, Archived: bareSum[:]}, "no recovery slot"},
	} {
		if err := check(tc.k, tc.encrypted, tc.req); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

func TestArchive(t *testing.T) {
	k, old := rotated(t, recovery)
	stored := k.Marshal()
	path := filepath.Join(t.TempDir(), "archive.json")
	if err := os.WriteFile(path+".new", stored[:10], 0o600); err != nil { // broken off
		t.Fatal(err)
	}
	want := sha256.Sum256(stored)
	for range 2 { // the second time, the file is there
		if sum, err := Archive(path, stored, old); err != nil || !bytes.Equal(sum, want[:]) {
			t.Fatalf("%x, %v", sum, err)
		}
	}
	if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, stored) {
		t.Errorf("%q, %v", b, err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
	refused := func(path string, stored []byte, id seal.KeyID, want string) {
		t.Helper()
		if _, err := Archive(path, stored, id); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	other, otherOld := rotated(t, recovery)
	refused(path, other.Marshal(), otherOld, "is no copy of the present keyring; name another file with --archive")
	refused(path, stored, otherOld, "is not that of a retired KEK")
	refused(filepath.Join(t.TempDir(), "none", "a.json"), stored, old, "no such file")
	bare, bareOld := rotated(t, seal.Slot{Type: seal.TypeTPM, Node: "cp-1", Data: []byte("{}")})
	refused(filepath.Join(t.TempDir(), "a.json"), bare.Marshal(), bareOld, "no recovery slot")
}
