package prune

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

func encrypt(t *testing.T, n *node.Node) {
	t.Helper()
	if _, _, err := n.Unlocker.Encrypt(make([]byte, 32)); err != nil {
		t.Fatal(err)
	}
}

// slotFor is a recovery slot with an identity that opens archives for it.
func slotFor(t *testing.T) (seal.Slot, string) {
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
	return s, identity.String()
}

func retired(n *node.Node) (all []seal.KeyID) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return nil
	}
	for _, r := range k.Info().Retired {
		all = append(all, r.KeyID)
	}
	return all
}

// TestThereAndBack: a KEK leaves the keyring only after kube-apiserver has encrypted under
// the current one, and its archive brings it back. A check alone changes nothing.
func TestThereAndBack(t *testing.T) {
	slot, identity := slotFor(t)
	k, old := rotated(t, slot)
	n := nodetest.Holding(t, "cp-1", k)
	if _, err := ArchiveKEK(t.Context(), n, admin.ArchiveRequest{KeyID: old, ForPrune: true}); err == nil || !strings.Contains(err.Error(), "prune: kube-apiserver has not encrypted anything") {
		t.Errorf("before an Encrypt: %v", err)
	}
	encrypt(t, n)
	made, err := ArchiveKEK(t.Context(), n, admin.ArchiveRequest{KeyID: old, ForPrune: true})
	if err != nil || made.KeyID != old || len(made.Recipients) != 1 {
		t.Fatalf("%+v, %v", made, err)
	}
	for _, check := range []bool{true, false} {
		s, err := Remove(t.Context(), n, admin.PruneRequest{KeyID: old, Archive: made.Archive, Check: check})
		if err != nil || slices.Contains(retired(n), old) != check || len(s.Changes) == 0 != check {
			t.Fatalf("check %v: %+v, %v, retired: %q", check, s, err, retired(n))
		}
	}
	if _, err := Remove(t.Context(), n, admin.PruneRequest{KeyID: old, Archive: made.Archive}); err == nil || !strings.Contains(err.Error(), "does not belong to a retired KEK") {
		t.Errorf("twice: %v", err)
	}
	_, stranger := slotFor(t)
	if _, err := ImportArchive(t.Context(), n, admin.ImportArchiveRequest{Archive: made.Archive, Identity: []byte(stranger)}); seal.CauseOf(err) != seal.CauseNoSlot || len(retired(n)) != 0 {
		t.Errorf("with another identity: %v", err)
	}
	s, err := ImportArchive(t.Context(), n, admin.ImportArchiveRequest{Archive: made.Archive, Identity: []byte(identity)})
	if err != nil || !slices.Equal(retired(n), []seal.KeyID{old}) || s.CurrentKeyID != k.CurrentID() {
		t.Fatalf("%+v, %v", s, err)
	}
	s, err = ImportArchive(t.Context(), n, admin.ImportArchiveRequest{Archive: made.Archive, Identity: []byte(identity)})
	if err != nil || len(s.Changes) != 1 || !strings.HasSuffix(s.Changes[0], " already") {
		t.Errorf("again: %+v, %v", s, err)
	}
}

// TestNotRunning: without a serve nobody knows under which KEK kube-apiserver encrypts, so
// only an archive that removes nothing is made.
func TestNotRunning(t *testing.T) {
	k, old := rotated(t, recoverySlot(t))
	n := nodetest.Holding(t, "cp-1", k)
	if _, err := ArchiveAlone(t.Context(), n, admin.ArchiveRequest{KeyID: old, ForPrune: true}); err == nil || !strings.Contains(err.Error(), "kleidi serve is not running") {
		t.Errorf("%v", err)
	}
	if made, err := ArchiveAlone(t.Context(), n, admin.ArchiveRequest{KeyID: old}); err != nil || len(made.Archive) == 0 {
		t.Errorf("%+v, %v", made, err)
	}
	if _, err := ArchiveAlone(t.Context(), n, admin.ArchiveRequest{KeyID: k.CurrentID()}); err == nil || !strings.Contains(err.Error(), "archive: key ID "+string(k.CurrentID())+" does not belong to a retired KEK") {
		t.Errorf("the current KEK: %v", err)
	}
}

// TestVouched: an archive is taken if a KEK of the keyring made it. Otherwise the operator
// must name its key ID, which never helps an archive of another KEK.
func TestVouched(t *testing.T) {
	k, old := rotated(t, recoverySlot(t))
	other, otherOld := rotated(t, recoverySlot(t))
	parse := func(b []byte) *keyring.UntrustedArchive {
		u, err := keyring.ParseArchive(b)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	own, foreign := parse(archived(t, k, old)), parse(archived(t, other, otherOld))
	for name, row := range map[string]struct {
		u       *keyring.UntrustedArchive
		trusted seal.KeyID
		says    string
	}{
		"own":                           {own, "", ""},
		"own, named":                    {own, old, ""},
		"own, another named":            {own, otherOld, "and --trust-key-id names " + string(otherOld)},
		"foreign":                       {foreign, "", "name it in --trust-key-id"},
		"foreign, named":                {foreign, otherOld, ""},
		"foreign, named by the own KEK": {foreign, old, "and --trust-key-id names " + string(old)},
	} {
		err := vouched(row.u, k, row.trusted)
		if row.says == "" && err != nil || row.says != "" && (seal.CauseOf(err) != seal.CauseAnchor || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// memoryArchives are the archives of a cluster store.
type memoryArchives map[string][]byte

func (m memoryArchives) Archive(_ context.Context, id string) ([]byte, error) {
	if b, ok := m[id]; ok {
		return b, nil
	}
	return nil, fs.ErrNotExist
}

func (m memoryArchives) CreateArchive(_ context.Context, id string, b []byte) error {
	if _, ok := m[id]; ok {
		return store.ErrConflict
	}
	m[id] = b
	return nil
}

// TestArchiveInStore: an archive that an interrupted prune left in the cluster store is as
// good as a new one. A different object under that name is never replaced.
func TestArchiveInStore(t *testing.T) {
	local, old := rotated(t, recoverySlot(t))
	upgraded, err := local.Upgrade(keyring.Node{Name: "cp-1"})
	if err != nil {
		t.Fatal(err)
	}
	defer upgraded.Close()
	k, err := upgraded.InCluster()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	req := admin.PruneRequest{KeyID: old, Archive: archived(t, k, old)}
	staged, err := k.Stage(newKEK(t), k.Slots(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer staged.Close()
	again, err := staged.Activate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for name, row := range map[string]struct {
		k     *keyring.Keyring
		there memoryArchives
		says  string
		kept  int
	}{
		"by a former KEK": {again, memoryArchives{string(old): archived(t, k, old)}, "made under key ID " + string(k.CurrentID()), 1},
		"not shared":      {upgraded, memoryArchives{}, "", 0},
		"empty":           {k, memoryArchives{}, "", 1},
		"interrupted":     {k, memoryArchives{string(old): archived(t, k, old)}, "", 1},
		"other object":    {k, memoryArchives{string(old): []byte("{}")}, "keep a copy of that object, delete it", 1},
	} {
		err := archiveInStore(t.Context(), &node.Node{Archives: row.there}, row.k, req)
		if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) || len(row.there) != row.kept {
			t.Errorf("%s: %v, %d kept", name, err, len(row.there))
		}
	}
	if err := archiveInStore(t.Context(), &node.Node{}, k, req); err != nil {
		t.Errorf("without a cluster store: %v", err)
	}
}

// TestReadArchive: an archive comes from the request, or by its key ID from the cluster
// store. An archive under another name is refused.
func TestReadArchive(t *testing.T) {
	k, old := rotated(t, recoverySlot(t))
	b := archived(t, k, old)
	in := func(m memoryArchives) *node.Node { return &node.Node{Archives: m} }
	for name, row := range map[string]struct {
		n    *node.Node
		req  admin.ImportArchiveRequest
		says string
	}{
		"file":         {&node.Node{}, admin.ImportArchiveRequest{Archive: b}, ""},
		"no store":     {&node.Node{}, admin.ImportArchiveRequest{KeyID: old}, "this node has no access to the cluster store; name the file of the archive"},
		"store":        {in(memoryArchives{string(old): b}), admin.ImportArchiveRequest{KeyID: old}, ""},
		"not in store": {in(memoryArchives{}), admin.ImportArchiveRequest{KeyID: old}, "name the file of the archive"},
		"another name": {in(memoryArchives{"k1-x": b}), admin.ImportArchiveRequest{KeyID: "k1-x"}, "KeyringArchive k1-x is that of key ID " + string(old)},
	} {
		u, err := readArchive(t.Context(), row.n, row.req)
		if row.says == "" && (err != nil || u.Info().KeyID != old) || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFindArchives: a named file comes before the state folder. A KEK that the keyring holds
// needs no archive, and a file of another KEK is none.
func TestFindArchives(t *testing.T) {
	k, old := rotated(t, recoverySlot(t))
	other, otherOld := rotated(t, recoverySlot(t))
	cfg := config.Default()
	cfg.State.Dir, cfg.Admin.Socket = t.TempDir(), filepath.Join(t.TempDir(), "none")
	write := func(path string, b []byte) string {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	named := write(filepath.Join(t.TempDir(), "named.json"), archived(t, k, old))
	inFolder := write(cfg.ArchivePath(otherOld), archived(t, other, otherOld))
	write(cfg.ArchivePath("k1-third"), archived(t, k, old)) // under a wrong name
	use := func(id seal.KeyID, role string) usage.KeyIDUse {
		return usage.KeyIDUse{KeyID: string(id), Role: role}
	}
	ids := []usage.KeyIDUse{use(old, ""), use(otherOld, ""), use("k1-third", ""), use(old, "retired")}
	if err := FindArchives(t.Context(), cfg, ids, []string{named}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{named, inFolder, "", ""} {
		if ids[i].Archive != want {
			t.Errorf("%s (%s): %q, want %q", ids[i].KeyID, ids[i].Role, ids[i].Archive, want)
		}
	}
	bad := write(filepath.Join(t.TempDir(), "bad.json"), []byte("{}"))
	if err := FindArchives(t.Context(), nil, nil, []string{bad}); err == nil || !strings.Contains(err.Error(), bad) {
		t.Errorf("a named file that is no archive: %v", err)
	}
}

// TestCarriedRecords: without a cluster store, every node needs a record from after the last
// change of the keyring. A record of another revision counts as none.
func TestCarriedRecords(t *testing.T) {
	first, err := keyring.New(seal.ClusterID{1}, newKEK(t), []seal.Slot{recoverySlot(t)}, []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	alone, err := first.Upgrade(keyring.Node{Name: "cp-1"})
	if err != nil {
		t.Fatal(err)
	}
	defer alone.Close()
	k, err := alone.WithNode(keyring.Node{Name: "cp-2"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	later, err := k.WithNode(keyring.Node{Name: "cp-3"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer later.Close()
	record := func(k *keyring.Keyring, encrypted bool) []byte {
		n := nodetest.Holding(t, "cp-2", k)
		if encrypted {
			encrypt(t, n)
		}
		_, b, err := node.Carrier(n).Export(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	seat := nodetest.Holding(t, "cp-1", k)
	says := func(carried ...[]byte) string {
		if _, err := everyNodeEncrypts(t.Context(), seat, carried); err != nil {
			return err.Error()
		}
		return ""
	}
	const none = "node cp-2: no record from after the last change of the keyring is named"
	if got := says(record(k, true)); !strings.Contains(got, "node cp-1: ") || strings.Contains(got, "node cp-2") {
		t.Errorf("before an Encrypt on this node: %s", got)
	}
	encrypt(t, seat)
	for name, row := range map[string]struct{ got, want string }{
		"not carried":         {says(), none},
		"of another revision": {says(record(later, true)), none},
		"before an Encrypt":   {says(record(k, false)), "node cp-2: "},
		"no record":           {says([]byte("{}")), "parse record"},
	} {
		if !strings.Contains(row.got, row.want) {
			t.Errorf("%s: %s", name, row.got)
		}
	}
	if got := says(record(k, true)); got != "" {
		t.Errorf("with every record: %s", got)
	}
	if _, err := everyNodeEncrypts(t.Context(), nodetest.Holding(t, "cp-2", k), nil); err == nil || !strings.Contains(err.Error(), "only node cp-1 can change") {
		t.Errorf("on a node without the seat: %v", err)
	}
}

// changingArchives are the archives of a cluster store. While one is written, somebody
// changes the keyring.
type changingArchives struct {
	memoryArchives
	change func() error
}

func (c changingArchives) CreateArchive(ctx context.Context, id string, b []byte) error {
	if err := c.change(); err != nil {
		return err
	}
	return c.memoryArchives.CreateArchive(ctx, id, b)
}

// TestChangedMeanwhile: the proof is about one revision of the keyring, so a rotation that
// begins after it ends the prune.
func TestChangedMeanwhile(t *testing.T) {
	slot := recoverySlot(t)
	local, old := rotated(t, slot)
	upgraded, err := local.Upgrade(keyring.Node{Name: "cp-1"})
	if err != nil {
		t.Fatal(err)
	}
	defer upgraded.Close()
	k, err := upgraded.InCluster()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	n := nodetest.Holding(t, "cp-1", k)
	encrypt(t, n)
	archives := changingArchives{memoryArchives{}, func() error {
		_, version, err := n.Keyring.Load(t.Context())
		if err != nil {
			return err
		}
		staged, err := k.Stage(newKEK(t), []seal.Slot{slot}, time.Now())
		if err == nil {
			staged, err = staged.OnNode("cp-1", nil, nil)
		}
		if err != nil {
			return err
		}
		return n.Unlocker.Adopt(t.Context(), version, unlock.Opener{}, staged, []*keyring.Keyring{staged})
	}}
	n.Archives = archives
	_, err = Remove(t.Context(), n, admin.PruneRequest{KeyID: old, Archive: archived(t, k, old)})
	if err == nil || !strings.Contains(err.Error(), "the keyring has changed meanwhile; nothing was changed") || !slices.Equal(retired(n), []seal.KeyID{old}) {
		t.Errorf("%v, retired: %q", err, retired(n))
	}
	if len(archives.memoryArchives) != 1 {
		t.Error("the rotation began before the proof")
	}
}
