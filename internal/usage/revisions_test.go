package usage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// TestMalformedRevisions: what is no revision of a key is refused, and not left out.
func TestMalformedRevisions(t *testing.T) {
	revision := append(binary.BigEndian.AppendUint64(nil, 2), '_')
	revision = binary.BigEndian.AppendUint64(revision, 0)
	value := protowire.AppendBytes(protowire.AppendTag(nil, fieldValue, protowire.BytesType), []byte("x"))
	key := protowire.AppendBytes(protowire.AppendTag(nil, fieldKey, protowire.BytesType), []byte("/registry/secrets/a/b"))
	for name, row := range map[string]struct{ bucketKey, message []byte }{
		"another letter": {append(bytes.Clone(revision), 'u'), key},
		"no key":         {revision, value},
		"too short":      {revision[:16], key},
	} {
		if err := newLive(DefaultPrefix).add(row.bucketKey, row.message); !errors.Is(err, errDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := newLive(DefaultPrefix).add(revision, append(key, value...)); err != nil {
		t.Error(err)
	}
}

// TestSnapshotReplaced: as many other bytes are noticed by the time of the file.
func TestSnapshotReplaced(t *testing.T) {
	file := writeFile(t, summed(makeDatabase(t, etcd36, put("/registry/secrets/a/b", encrypted("kleidi", "k1-a")))))
	_, err := Snapshot(t.Context(), file, DefaultPrefix, func(int64, int64) {
		if err := os.Chtimes(file, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Error(err)
		}
	})
	if err == nil || !strings.Contains(err.Error(), "changed while it was read") {
		t.Error(err)
	}
}

// TestNamesakes: a key of another provider with the name of the KEK is not the KEK.
func TestNamesakes(t *testing.T) {
	r := &Report{Resources: []Resource{{Name: "secrets", Objects: 6, Keys: []Count{
		{Key{KMSv2, "kleidi", "k1-a"}, 1}, {Key{AESCBC, "", "k1-a"}, 2}, {Key{Provider: Unknown, ID: "k1-a"}, 3},
	}}}}
	if under, unknown := r.Under("k1-a"); under != 1 || unknown != 3 {
		t.Errorf("%d under it, %d unknown", under, unknown)
	}
	if left := r.Left("k1-a", nil); left != 5 {
		t.Errorf("%d left, want 5", left)
	}
	if ids := r.KeyIDs(); len(ids) != 1 || ids["k1-a"] != 1 {
		t.Errorf("%v", ids)
	}
}
