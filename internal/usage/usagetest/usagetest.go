// Package usagetest makes etcd snapshots for tests, with bbolt as etcd does.
package usagetest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"os"
	"path/filepath"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/encoding/protowire"
)

// Etcd36 is the bucket meta of etcd 3.6.
var Etcd36 = map[string]string{"consistent_index": "12345678", "term": "12345678", "storageVersion": "3.6.0"}

// Change is one revision. A nil value deletes the key. With neither key nor value,
// nothing is stored, as by etcdutl snapshot restore --bump-revision.
type Change struct {
	Key   string
	Value []byte
}

// Encrypted returns a value as kube-apiserver's KMS v2 provider stores it.
func Encrypted(plugin, keyID string) []byte {
	b := []byte("k8s:enc:kms:v2:" + plugin + ":")
	b = protowire.AppendString(protowire.AppendTag(b, 1, protowire.BytesType), "ciphertext")
	b = protowire.AppendString(protowire.AppendTag(b, 2, protowire.BytesType), keyID)
	b = protowire.AppendString(protowire.AppendTag(b, 3, protowire.BytesType), "seed")
	return protowire.AppendVarint(protowire.AppendTag(b, 5, protowire.VarintType), 1)
}

// Database returns a database without a checksum. meta is the content of the bucket
// meta. The first change has revision 2.
func Database(meta map[string]string, changes ...Change) ([]byte, error) {
	dir, err := os.MkdirTemp("", "usagetest")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	db, err := bbolt.Open(filepath.Join(dir, "db"), 0o600, &bbolt.Options{NoSync: true, PageSize: 4096})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	err = db.Update(func(tx *bbolt.Tx) error {
		m, err := tx.CreateBucket([]byte("meta"))
		if err != nil {
			return err
		}
		for k, v := range meta {
			if err := m.Put([]byte(k), []byte(v)); err != nil {
				return err
			}
		}
		keys, err := tx.CreateBucket([]byte("key"))
		if err != nil {
			return err
		}
		for i, c := range changes {
			if err := keys.Put(c.at(uint64(i+2)), c.message()); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer // as etcd's own Snapshot does
	err = db.View(func(tx *bbolt.Tx) error { _, err := tx.WriteTo(&b); return err })
	return b.Bytes(), err
}

// at returns the key of the bucket for a revision.
func (c Change) at(revision uint64) []byte {
	k := binary.BigEndian.AppendUint64(nil, revision)
	k = binary.BigEndian.AppendUint64(append(k, '_'), 0)
	if c.Value == nil && c.Key != "" {
		k = append(k, 't')
	}
	return k
}

// message returns the mvccpb.KeyValue.
func (c Change) message() []byte {
	if c.Key == "" {
		return nil
	}
	b := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), c.Key)
	if c.Value != nil {
		b = protowire.AppendBytes(protowire.AppendTag(b, 5, protowire.BytesType), c.Value)
	}
	return b
}

// Summed appends the checksum that etcdctl snapshot save appends.
func Summed(db []byte) []byte {
	sum := sha256.Sum256(db)
	return append(bytes.Clone(db), sum[:]...)
}
