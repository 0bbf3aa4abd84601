package objects

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
)

// TestKine: the objects of a kube-apiserver over kine, as in k3s without etcd, are counted
// under their keys before a rotation, after it, and after their migration.
func TestKine(t *testing.T) {
	binaries, err := cluster.Built("kine", "kube-apiserver-1.37")
	if err != nil {
		t.Fatal(err)
	}
	for name, database := range map[string]func(t *testing.T, dir string) string{
		"SQLite": func(_ *testing.T, dir string) string {
			return "sqlite://" + dir + "/kine.db?_journal=WAL&cache=shared&_busy_timeout=30000"
		},
		"PostgreSQL": startPostgreSQL,
	} {
		t.Run(name, func(t *testing.T) {
			m := &machine{t: t, Node: node.New(t), binaries: binaries}
			socket := "unix://" + m.Path("kine.sock")
			node.Start(t, m.Path("kine.log"), binaries["kine"], "--endpoint", database(t, m.Dir()), "--listen-address", socket, "--metrics-bind-address", "0")
			node.Eventually(t, 5*time.Minute, "kine listens", func() error { _, err := os.Stat(m.Path("kine.sock")); return err })
			m.serve(socket)
			m.overKine(socket)
		})
	}
}

// overKine rotates and migrates the objects behind kine's socket.
func (m *machine) overKine(socket string) {
	m.t.Helper()
	const secrets = 700 // more than a page
	for i := range secrets {
		name := fmt.Sprint("o-", i)
		if err := cluster.Soon(func() error { return m.api.Put("secrets", name, map[string]string{"password": name}) }); err != nil {
			m.t.Fatal(err)
		}
	}
	counts := func(code int, want ...int) { // of the current key, and of the first one
		m.t.Helper()
		k := m.Keyring()
		ids := m.usage(code, "--etcd", socket).Stores[0].KeyIDs()
		got := []int{ids[k.Current.KeyID]}
		if len(k.Retired) > 0 {
			got = append(got, ids[k.Retired[0].KeyID])
		}
		if fmt.Sprint(got) != fmt.Sprint(want) || len(ids) > len(want) {
			m.t.Fatalf("%v, want %v: %v", got, want, ids)
		}
	}
	all := m.listed()
	counts(0, all)
	m.Run("rotate")
	current := m.Keyring().Current.KeyID
	probes := 0
	node.Eventually(m.t, 4*time.Minute, "kube-apiserver encrypts under the current key", func() error {
		if err := m.api.Ready(); err != nil { // the health check asks for the plugin's status
			return err
		}
		if err := m.api.Put("secrets", fmt.Sprint("probe-", probes), map[string]string{"a": "b"}); err != nil {
			return err
		}
		probes++
		if m.usage(4, "--etcd", socket).Stores[0].KeyIDs()[current] == 0 {
			return errors.New("still the former key")
		}
		return nil
	})
	counts(4, 1, all+probes-1)
	if out, code := m.kleidi("migrate", "--kubeconfig", m.kubeconfig, "--by", "patch", "--resources", "secrets,configmaps", "--rate", "2000"); code != 0 {
		m.t.Fatalf("migrate: exit code %d: %s", code, out)
	}
	counts(0, all+probes, 0)
}

// listed is the number of encrypted objects that kube-apiserver lists.
func (m *machine) listed() (n int) {
	m.t.Helper()
	for _, resource := range []string{"secrets", "configmaps"} {
		var list struct{ Items []struct{} }
		if err := cluster.Soon(func() error { return m.api.Do(http.MethodGet, "/api/v1/"+resource, nil, &list) }); err != nil {
			m.t.Fatal(err)
		}
		n += len(list.Items)
	}
	return n
}

// startPostgreSQL runs Debian's PostgreSQL, which refuses to be root, and returns kine's
// name of a database in it.
func startPostgreSQL(t *testing.T, dir string) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(found) == 0 {
		t.Fatalf("PostgreSQL is not installed: %v", err)
	}
	as, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.Atoi(as.Uid)
	if err != nil {
		t.Fatal(err)
	}
	data := t.TempDir() // dir is root's
	for at := data; strings.HasPrefix(at, os.TempDir()+"/"); at = filepath.Dir(at) {
		if err := os.Chmod(at, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(data, uid, -1); err != nil {
		t.Fatal(err)
	}
	run := func(log, program string, args ...string) *node.Process {
		t.Helper()
		args = append([]string{"-C", "/", "setpriv", "--reuid", as.Uid, "--regid", as.Gid, "--clear-groups", "--pdeathsig", "KILL", filepath.Join(filepath.Dir(found[0]), program)}, args...)
		return node.Start(t, filepath.Join(dir, log), "env", args...)
	}
	run("initdb.log", "initdb", "--pgdata", data+"/pg", "--auth", "trust", "--username", "kine", "--no-sync", "--locale", "C", "--encoding", "UTF8").Wait()
	if _, err := os.Stat(data + "/pg/global/pg_control"); err != nil {
		t.Fatal(err)
	}
	port := node.FreePort(t)
	t.Cleanup(run("postgres.log", "postgres", "-D", data+"/pg", "-k", data, "-p", port, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off").Stop) // it removes its shared memory
	ready := filepath.Join(filepath.Dir(found[0]), "pg_isready")
	node.Eventually(t, 5*time.Minute, "PostgreSQL answers", func() error { return exec.Command(ready, "-h", "127.0.0.1", "-p", port).Run() })
	return "postgres://kine@127.0.0.1:" + port + "/kubernetes?sslmode=disable"
}
