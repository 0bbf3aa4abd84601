package objects

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
)

// TestOlderSnapshots: snapshots of etcd 3.5 and 3.4, from before a rotation, are checked,
// restored into an etcd 3.6, and read by kube-apiserver.
func TestOlderSnapshots(t *testing.T) {
	binaries, err := cluster.Built("etcd", "etcd-3.5", "etcdutl")
	if err != nil {
		t.Fatal(err)
	}
	m := startOn(t, "etcd-3.5")
	secrets := []string{"a", "b", "c"}
	for _, name := range secrets {
		if err := m.api.Put("secrets", name, map[string]string{"password": name}); err != nil {
			t.Fatal(err)
		}
	}
	of35, of34 := m.Path("3.5.db"), m.Path("3.4.db")
	m.etcd.Snapshot(t, of35)
	asOf34(t, of35, of34)
	m.Run("rotate")
	for version, snapshot := range map[string]string{"3.5": of35, "3.4": of34} {
		if out, code := m.kleidi("keyring", "check", "--snapshot", snapshot); code != 0 || !strings.Contains(out, "etcd "+version+", checksum right") || !strings.Contains(out, "retired  k1-") {
			t.Errorf("%s: exit code %d: %s", version, code, out)
		}
		m.api.Kill()
		m.etcd.Kill()
		if err := os.RemoveAll(m.etcd.Data()); err != nil {
			t.Fatal(err)
		}
		restore := exec.Command("sh", "-c", `exec "$0" snapshot restore "$1" --name "$NAME" --initial-cluster "$MEMBERS" --initial-advertise-peer-urls "$PEER" `+
			`--data-dir "$DATA" --bump-revision 1000000000 --mark-compacted`, binaries["etcdutl"], snapshot)
		restore.Env = append(os.Environ(), m.etcd.RestoreEnv()...)
		if out, err := restore.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", version, err, out)
		}
		m.etcd.Upgrade(binaries["etcd"])
		m.etcd.Start(t)
		m.etcd.WaitHealthy(t)
		m.api.Start(t)
		node.Eventually(t, 2*time.Minute, "kube-apiserver is ready", m.api.Ready)
		for _, name := range secrets {
			if got, err := m.api.Secret(name); err != nil || got["password"] != name {
				t.Errorf("%s: Secret %s is %v, %v", version, name, got, err)
			}
		}
	}
}

// asOf34 makes a snapshot of etcd 3.4 of one of 3.5, which keeps more in its bucket "meta".
func asOf34(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b[:len(b)-sha256.Size], 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(to, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		meta := tx.Bucket([]byte("meta"))
		if meta.Get([]byte("term")) == nil {
			return errors.New("the snapshot is not of etcd 3.5")
		}
		return errors.Join(meta.Delete([]byte("term")), meta.Delete([]byte("confState")))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	if b, err = os.ReadFile(to); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	if err := os.WriteFile(to, bytes.Join([][]byte{b, sum[:]}, nil), 0o600); err != nil {
		t.Fatal(err)
	}
}
