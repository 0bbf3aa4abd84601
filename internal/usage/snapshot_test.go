package usage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/internal/etcdfile"
	"github.com/beezy-dev/kleidi/internal/usage/usagetest"
	"github.com/beezy-dev/kleidi/seal"
)

type change = usagetest.Change

func put(key string, value []byte) change { return change{Key: key, Value: value} }
func deleted(key string) change           { return change{Key: key} }

var (
	etcd36    = usagetest.Etcd36
	encrypted = usagetest.Encrypted
	summed    = usagetest.Summed
)

func makeDatabase(t testing.TB, meta map[string]string, changes ...change) []byte {
	t.Helper()
	b, err := usagetest.Database(meta, changes...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t testing.TB, b []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "etcd.db")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestSnapshot(t *testing.T) {
	const old, current = "k1-old", "k1-current"
	db := makeDatabase(t, etcd36,
		put("/registry/secrets/a/moved", encrypted("kleidi", old)),
		put("/registry/secrets/a/stale", encrypted("kleidi", old)),
		put("/registry/secrets/a/gone", encrypted("kleidi", old)),
		put("/registry/secrets/a/clear", []byte("k8s\x00plain")),
		put("/registry/secrets/a/moved", encrypted("kleidi", current)),
		deleted("/registry/secrets/a/gone"),
		put("/registry/secrets/a/again", encrypted("kleidi", old)),
		deleted("/registry/secrets/a/again"),
		put("/registry/secrets/a/again", encrypted("kleidi", current)),
		put("/registry/configmaps/a/large", bytes.Repeat([]byte("x"), 100_000)),
		put("/registry/stable.example.com/crontabs/a/b", []byte("k8s:enc:aescbc:v1:key1:x")),
		put("/bootstrap/0a1b", []byte("k3s")),
		put("/kubernetes/secrets/a/b", encrypted("kleidi", old)),
		put("compact_rev_key", []byte("7")),
		change{}, // a restore with --bump-revision
		put("/registry/kleidi.beezy.dev/keyrings/cluster", []byte(`{"spec":{"keyring":"b2xk"}}`)),
		put("/registry/kleidi.beezy.dev/keyrings/cluster", []byte(`{"spec":{"keyring":"bmV3"}}`)),
	)
	r, err := Snapshot(t.Context(), writeFile(t, summed(db)), DefaultPrefix, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []Resource{
		{"(elsewhere)", 1, []Count{{Key{KMSv2, "kleidi", old}, 1}}},
		{"configmaps", 1, []Count{{Key{Provider: Identity}, 1}}},
		{"crontabs.stable.example.com", 1, []Count{{Key{AESCBC, "", "key1"}, 1}}},
		{"keyrings.kleidi.beezy.dev", 1, []Count{{Key{Provider: Identity}, 1}}},
		{"secrets", 4, []Count{{Key{KMSv2, "kleidi", current}, 2}, {Key{Provider: Identity}, 1}, {Key{KMSv2, "kleidi", old}, 1}}},
	}
	if b, err := r.SharedKeyring(); err != nil || string(b) != "new" {
		t.Errorf("the shared keyring: %q, %v", b, err)
	}
	if !reflect.DeepEqual(r.Resources, want) {
		t.Errorf("resources %+v\nwant      %+v", r.Resources, want)
	}
	if r.Revision != 18 || r.Objects != 8 || r.Others != 2 || *r.Snapshot != (SnapshotInfo{"3.6", true, 17}) {
		t.Errorf("%+v, %+v", r, r.Snapshot)
	}
	// elsewhere, the CronTab, and two Secrets
	if left := r.Left(current, nil); left != 4 {
		t.Errorf("%d are left, want 4", left)
	}
	if left := r.Left(current, []string{"configmaps"}); left != 5 {
		t.Errorf("with ConfigMaps %d are left, want 5", left)
	}
}

// TestSnapshotVersions: etcd 3.4, 3.5 and 3.6 store different data beside the keys.
func TestSnapshotVersions(t *testing.T) {
	secret := put("/registry/secrets/a/b", encrypted("kleidi", "k1-a"))
	for want, meta := range map[string]map[string]string{
		"3.4": {"consistent_index": "12345678"},
		"3.5": {"consistent_index": "12345678", "term": "12345678", "confState": "{}"},
		"3.6": etcd36,
	} {
		r, err := Snapshot(t.Context(), writeFile(t, summed(makeDatabase(t, meta, secret))), DefaultPrefix, nil)
		if err != nil || r.Snapshot.Etcd != want {
			t.Errorf("%s: %+v, %v", want, r, err)
		}
	}
	_, err := Snapshot(t.Context(), writeFile(t, summed(makeDatabase(t, map[string]string{"storageVersion": "4.0.0"}, secret))), DefaultPrefix, nil)
	if !errors.Is(err, errVersion) {
		t.Errorf("4.0: %v", err)
	}
}

// TestBadSnapshots: each fault of a snapshot has its own error, with a next step.
func TestBadSnapshots(t *testing.T) {
	var changes []change
	for i := range 1000 {
		changes = append(changes, put(fmt.Sprintf("/registry/secrets/a/%d", i), encrypted("kleidi", "k1-a")))
	}
	good := makeDatabase(t, etcd36, changes...)
	flipped := summed(good)
	flipped[len(good)/2] ^= 1
	half := summed(good[:len(good)/2/4096*4096]) // its checksum is correct
	dir := t.TempDir()
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		file string
		want error
		text string
	}{
		"missing":      {filepath.Join(dir, "none"), os.ErrNotExist, "snapshot: open"},
		"folder":       {dir, nil, "it is a folder, not a file; name the file that etcdctl"},
		"named pipe":   {pipe, nil, "it is a named pipe, not a file; name the file that etcdctl"},
		"empty":        {writeFile(t, nil), etcdfile.ErrNotDatabase, "name the file that etcdctl"},
		"text":         {writeFile(t, []byte(strings.Repeat("no database\n", 4096))), etcdfile.ErrNotDatabase, "name the file"},
		"no bucket":    {writeFile(t, summed(emptyDatabase(t))), etcdfile.ErrNoBucket, "name the file"},
		"cut anywhere": {writeFile(t, good[:len(good)-1000]), errTruncated, "copy it again"},
		"cut at page":  {writeFile(t, good[:len(good)/2/4096*4096]), errTruncated, "copy it again"},
		"half, summed": {writeFile(t, half), errTruncated, "copy it again"},
		"no sum left":  {writeFile(t, summed(good)[:len(good)+16]), errTruncated, "copy it again"},
		"a bit":        {writeFile(t, flipped), errChecksum, "copy it again"},
		"prefix":       {writeFile(t, summed(makeDatabase(t, etcd36, put("/other/secrets/a/b", []byte("x"))))), errNothing, "--prefix"},
	} {
		_, err := Snapshot(t.Context(), tc.file, DefaultPrefix, nil)
		if err == nil || tc.want != nil && !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func emptyDatabase(t testing.TB) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "db")
	db, err := bbolt.Open(file, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSnapshotBeingWritten: a file that a process has open for writing, or that changes,
// is not accepted.
func TestSnapshotBeingWritten(t *testing.T) {
	db := summed(makeDatabase(t, etcd36, put("/registry/secrets/a/b", encrypted("kleidi", "k1-a"))))
	refused := func(name, file string, progress Progress, text string) {
		t.Helper()
		_, err := Snapshot(t.Context(), file, DefaultPrefix, progress)
		var e *seal.Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), text) || e.Hint != hintWriting {
			t.Errorf("%s: %v", name, err)
		}
	}
	part := filepath.Join(t.TempDir(), "etcd.db.part")
	if err := os.WriteFile(part, db, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("etcdctl's own name", part, nil, "still being written")

	file := writeFile(t, db)
	w, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	refused("open for writing", file, nil, "still being written")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	refused("changed", file, func(int64, int64) {
		if err := os.WriteFile(file, append(db, 0), 0o600); err != nil {
			t.Error(err)
		}
	}, "changed while it was read")
}

// TestDamagedDatabases: whatever bits of a database are flipped, and with a checksum that
// matches, the reader ends without a panic, and either counts the same as bbolt or
// refuses.
func TestDamagedDatabases(t *testing.T) {
	var changes []change
	for i := range 3000 {
		changes = append(changes, put(fmt.Sprintf("/registry/secrets/a/%d", i%1000), encrypted("kleidi", fmt.Sprintf("k1-%d", i%7))))
	}
	good := makeDatabase(t, etcd36, changes...)
	want, err := readSnapshot(t.Context(), bytes.NewReader(good), int64(len(good)), DefaultPrefix, nil)
	if err != nil || want.Objects != 1000 {
		t.Fatalf("%+v, %v", want, err)
	}
	if got := bboltCount(t, good); !maps.Equal(got, want.KeyIDs()) {
		t.Errorf("bbolt counts %v, the reader %v", got, want.KeyIDs())
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	refused := 0
	for range 2000 {
		bad := bytes.Clone(good)
		for range 1 + rnd.IntN(3) {
			page := rnd.IntN(len(bad) / 4096)
			at := page*4096 + rnd.IntN(64) // prefer headers and elements to values
			bad[at] ^= byte(1 << rnd.IntN(8))
		}
		if _, err := readSnapshot(t.Context(), bytes.NewReader(bad), int64(len(bad)), DefaultPrefix, nil); err != nil {
			refused++
		}
	}
	if refused == 0 {
		t.Error("no damage was noticed")
	}
}

// TestRevisionsAscend: no revision stands twice or out of order, since the last one of a key
// counts.
func TestRevisionsAscend(t *testing.T) {
	at := func(main, sub uint64) []byte {
		return binary.BigEndian.AppendUint64(append(binary.BigEndian.AppendUint64(nil, main), '_'), sub)
	}
	for name, tc := range map[string]struct {
		second []byte
		good   bool
	}{
		"next": {at(6, 0), true}, "next of the same": {at(5, 2), true}, "the same": {at(5, 1), false}, "an earlier of the same": {at(5, 0), false},
		"earlier": {at(4, 2), false}, "a letter more": {append(at(6, 0), 'x'), false}, "no underscore": {bytes.ReplaceAll(at(6, 0), []byte("_"), []byte(".")), false},
	} {
		l := newLive(DefaultPrefix)
		if err := l.add(at(5, 1), nil); err != nil {
			t.Fatal(err)
		}
		if err := l.add(tc.second, nil); tc.good != (err == nil) || !tc.good && !errors.Is(err, errDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// bboltCount counts key IDs with bbolt.
func bboltCount(t testing.TB, b []byte) map[string]int {
	t.Helper()
	db, err := bbolt.Open(writeFile(t, b), 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	last := map[string]string{}
	err = db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("key")).ForEach(func(k, v []byte) error {
			key, value, err := keyValue(v)
			if last[string(key)] = keyOf(value).ID; len(k) > 17 {
				delete(last, string(key))
			}
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]int{}
	for _, id := range last {
		ids[id]++
	}
	return ids
}

// FuzzSnapshot: whatever the file holds, the reader ends without a panic, and accepts no
// more objects than the file has room for.
func FuzzSnapshot(f *testing.F) {
	for _, meta := range []map[string]string{etcd36, {"consistent_index": "1"}} {
		b := makeDatabase(f, meta, put("/registry/secrets/a/b", encrypted("kleidi", "k1-a")), deleted("/registry/secrets/a/b"), put("/registry/pods/a/c", []byte("k8s\x00")))
		f.Add(b)
		f.Add(summed(b))
	}
	var many []change
	for i := range 300 {
		many = append(many, put(fmt.Sprintf("/registry/secrets/a/%d", i), encrypted("kleidi", "k1-a")))
	}
	f.Add(makeDatabase(f, etcd36, many...))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := readSnapshot(context.Background(), bytes.NewReader(b), int64(len(b)), DefaultPrefix, nil)
		if err == nil && (r.Objects == 0 || r.Objects > len(b)/16) {
			t.Errorf("%d objects in %d bytes", r.Objects, len(b))
		}
	})
}

// TestSharedKeyring: a snapshot without a readable shared keyring yields an error that
// says so.
func TestSharedKeyring(t *testing.T) {
	const key = "/registry/kleidi.beezy.dev/keyrings/cluster"
	for name, tc := range map[string]struct {
		changes []change
		want    string
	}{
		"none":      {[]change{put("/registry/secrets/a/b", []byte("x"))}, "holds no keyring of kleidi"},
		"deleted":   {[]change{put("/registry/secrets/a/b", []byte("x")), put(key, []byte(`{"spec":{"keyring":"bmV3"}}`)), deleted(key)}, "holds no keyring of kleidi"},
		"encrypted": {[]change{put(key, encrypted("kleidi", "k1-x"))}, "encrypted, or not in a form"},
		"empty":     {[]change{put(key, []byte(`{"spec":{}}`))}, "encrypted, or not in a form"},
	} {
		r, err := Snapshot(t.Context(), writeFile(t, summed(makeDatabase(t, etcd36, tc.changes...))), DefaultPrefix, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.SharedKeyring(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}
