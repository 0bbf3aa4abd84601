package kubernetes

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// onEach runs a scenario on a separate machine for each version of Kubernetes.
func onEach(t *testing.T, scenario func(t *testing.T, m *machine)) {
	t.Parallel()
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			scenario(t, newMachine(t, version))
		})
	}
}

// TestSecretInEtcd tests the main purpose: kube-apiserver's stored objects are
// encrypted under kleidi's current key, and read back.
func TestSecretInEtcd(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.ServeOpen()
		m.api.Start(t)
		m.waitReady(t)
		m.put(t, "first")
		m.mustHold(t, "first")

		current := m.Keyring().Current.KeyID
		got, ok := m.stored(t)["first"]
		if !ok {
			t.Fatal("etcd holds no Secret named first")
		}
		if got.keyID != current {
			t.Errorf("stored under key %q, the current key is %q", got.keyID, current)
		}
		t.Run("TPM", func(t *testing.T) { witness(t, m) })
		m.checkQuiet(t)
		// The disk is searched last, when etcd has written everything.
		m.api.Stop()
		m.Serving.Stop()
		m.etcd.Stop()
		m.searchDisk(t, plaintext("first"))
	})
}

// checkQuiet writes and reads many Secrets. kube-apiserver's DEK seed is enough for them,
// so the plugin must receive no call.
func (m *machine) checkQuiet(t *testing.T) {
	t.Helper()
	encrypts, decrypts := m.Calls("Encrypt"), m.Calls("Decrypt")
	if encrypts == 0 {
		t.Error("a Secret is stored and Encrypt was never called")
	}
	for i := range 50 {
		name := fmt.Sprint("many-", i)
		m.put(t, name)
		m.mustHold(t, name)
	}
	if e, d := m.Calls("Encrypt")-encrypts, m.Calls("Decrypt")-decrypts; e+d > 0 {
		t.Errorf("50 writes and reads took %d Encrypt and %d Decrypt", e, d)
	}
}

// searchDisk looks for plaintext in everything that etcd, kleidi and kube-apiserver
// have written.
func (m *machine) searchDisk(t *testing.T, plain string) {
	t.Helper()
	forms := []string{plain, base64.StdEncoding.EncodeToString([]byte(plain))}
	var read int
	err := filepath.WalkDir(m.Dir(), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		read += len(b)
		for _, form := range forms {
			if bytes.Contains(b, []byte(form)) {
				t.Errorf("%s holds the plaintext", path)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if read < 1<<20 {
		t.Errorf("only %d bytes searched", read)
	}
}

// TestRestarts restarts each side, then both, then kube-apiserver first.
func TestRestarts(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.ServeOpen()
		m.api.Start(t)
		m.waitReady(t)
		m.put(t, "a")

		t.Log("kube-apiserver restarts")
		m.api.Stop()
		m.api.Start(t)
		m.waitReady(t)
		m.mustHold(t, "a")
		m.put(t, "b")

		t.Log("kleidi restarts")
		m.Serving.Stop()
		m.ServeOpen()
		m.waitReady(t)
		m.put(t, "c")
		m.mustHold(t, "a", "b", "c")

		t.Log("both restart")
		m.api.Stop()
		m.Serving.Stop()
		m.ServeOpen()
		m.api.Start(t)
		m.waitReady(t)
		m.mustHold(t, "a", "b", "c")

		t.Log("the machine reboots, and kube-apiserver starts first")
		m.api.Stop()
		m.Serving.Stop()
		m.Reboot(m.Kernel)
		m.api.Start(t)
		m.waitNotReady(t)
		if err := m.holds("a"); err == nil {
			t.Error("a Secret is readable without kleidi")
		}
		m.ServeOpen()
		m.waitReady(t)
		node.Eventually(t, reconnect, "Secrets are readable", func() error { return m.holds("a", "b", "c") })
		m.put(t, "d")
		m.mustHold(t, "d")
	})
}

// TestKilledAndBack kills kleidi. kube-apiserver must report that, keep serving what it
// can, and recover without help once kleidi is back on the same socket.
func TestKilledAndBack(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.ServeOpen()
		m.api.Start(t)
		m.waitReady(t)
		m.put(t, "before")

		m.Serving.Kill()
		m.waitNotReady(t)
		m.mustHold(t, "before")
		// kube-apiserver's DEK seed lasts for three minutes.
		m.put(t, "meanwhile")
		if err := m.api.Put("configmaps", "meanwhile", nil); err != nil {
			t.Error("ConfigMaps are not served:", err)
		}

		m.ServeOpen()
		m.waitReady(t)
		m.put(t, "after")
		m.api.Stop()
		m.api.Start(t)
		m.waitReady(t)
		m.mustHold(t, "before", "meanwhile", "after")
	})
}

// TestLongOutage keeps kleidi away until kube-apiserver can't write any more, three
// minutes after the last good Status. Unencrypted objects must be served all the time,
// and writing must resume once kleidi is back.
func TestLongOutage(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.ServeOpen()
		m.api.Start(t)
		m.waitReady(t)
		m.put(t, "before")

		m.Serving.Kill()
		served := time.Now()
		node.Eventually(t, 5*time.Minute, "Secrets are refused", func() error {
			// One of these many calls may meet a busy machine.
			if err := m.api.Put("configmaps", "meanwhile", nil); err != nil {
				if time.Since(served) > time.Minute {
					t.Fatal("ConfigMaps are not served:", err)
				}
				return err
			}
			served = time.Now()
			if err := m.api.Put("secrets", "before", map[string]string{"password": plaintext("before")}); err == nil {
				return errors.New("a Secret is written")
			}
			return nil
		})
		m.mustHold(t, "before")

		m.ServeOpen()
		m.waitReady(t)
		node.Eventually(t, reconnect, "Secrets are written", func() error {
			return m.api.Put("secrets", "after", map[string]string{"password": plaintext("after")})
		})
		m.mustHold(t, "before", "after")
	})
}

// TestRotation rotates the KEK. kube-apiserver must take up the new key ID without
// help, the old objects must stay readable, and after they are rewritten nothing in
// etcd may name the old key.
func TestRotation(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.ServeOpen()
		m.api.Start(t)
		m.waitReady(t)
		m.put(t, "one")
		m.put(t, "two")
		before := m.Keyring().Current.KeyID

		m.Run("rotate")
		after := m.Keyring()
		if after.Current.KeyID == before || len(after.Retired) != 1 || after.Retired[0].KeyID != before {
			t.Fatalf("current %q before, after rotation %+v", before, after)
		}
		node.Eventually(t, 4*time.Minute, "a new Secret is stored under the new key", func() error {
			if err := m.api.Ready(); err != nil {
				return err
			}
			m.put(t, "three")
			if id := m.stored(t)["three"].keyID; id != after.Current.KeyID {
				return fmt.Errorf("stored under %q", id)
			}
			return nil
		})

		metrics, err := m.api.Get("/metrics")
		if err != nil {
			t.Fatal(err)
		}
		if hash := fmt.Sprintf(`key_id_hash="sha256:%x"`, sha256.Sum256([]byte(after.Current.KeyID))); !strings.Contains(metrics, hash) {
			t.Errorf("kube-apiserver's metrics do not show %s", hash)
		}

		// Both keys work after restarts, and a read rewrites nothing.
		m.Serving.Stop()
		m.api.Stop()
		m.ServeOpen()
		m.api.Start(t)
		m.waitReady(t)
		m.mustHold(t, "one", "two", "three")
		if id := m.stored(t)["one"].keyID; id != before {
			t.Errorf("an untouched Secret is stored under %q, want %q", id, before)
		}

		if err := m.api.Rewrite(); err != nil {
			t.Fatal("rewrite the Secrets:", err)
		}
		for name, s := range m.stored(t) {
			if s.keyID != after.Current.KeyID {
				t.Errorf("Secret %s is still stored under %q", name, s.keyID)
			}
		}
		m.mustHold(t, "one", "two", "three")
	})
}

// TestOtherKernel boots a kernel to which the KEK is not sealed. kleidi must stay
// locked and say why, the cluster must keep serving unencrypted objects, and the
// recovery identity must restore everything without loss.
func TestOtherKernel(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.ServeOpen()
		m.api.Start(t)
		m.waitReady(t)
		m.put(t, "before")
		sealed := m.Keyring().Current.KeyID

		m.api.Stop()
		m.Serving.Stop()
		other := m.Kernel
		other.Kernel = "6.1.0-666-amd64"
		m.Reboot(other)
		m.Serve()
		m.WaitLocked("PCR 4")
		m.api.Start(t)
		m.waitNotReady(t)
		if err := m.holds("before"); err == nil {
			t.Error("a Secret is readable while kleidi is locked")
		}
		if err := m.api.Put("secrets", "refused", map[string]string{"password": plaintext("refused")}); err == nil {
			t.Error("a Secret is written while kleidi is locked")
		}
		if err := m.Serving.Alive(); err != nil {
			t.Fatal(err)
		}

		m.Run("recover", "--identity-file", m.Identity)
		m.WaitOpen()
		m.waitReady(t)
		node.Eventually(t, reconnect, "Secrets are readable", func() error { return m.holds("before") })
		m.put(t, "after")
		recovered := m.Keyring()
		if recovered.Current.KeyID == sealed || m.stored(t)["after"].keyID != recovered.Current.KeyID {
			t.Errorf("the key is not rotated: %q before, %q after", sealed, recovered.Current.KeyID)
		}

		t.Log("the other kernel boots again, unaided")
		m.api.Stop()
		m.Serving.Stop()
		m.Reboot(other)
		m.ServeOpen()
		m.api.Start(t)
		m.waitReady(t)
		m.mustHold(t, "before", "after")

		t.Log("the first kernel is no longer authorised")
		m.Serving.Stop()
		m.Reboot(m.Kernel)
		m.Serve()
		m.WaitLocked("PCR 4")
	})
}
