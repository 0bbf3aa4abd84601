package objects

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/internal/usage"
)

// count is the number of Secrets that the test stores. There are half as many ConfigMaps,
// and a twentieth as many CronTabs.
var count = flag.Int("objects", 10_000, "the number of Secrets")

const (
	resources = "secrets,configmaps,crontabs.stable.example.com"
	cronTabs  = "/apis/stable.example.com/v1/namespaces/" + cluster.Namespace + "/crontabs"
)

// machine is a control-plane node with kleidi, etcd and kube-apiserver.
type machine struct {
	*node.Node
	t          *testing.T
	etcd       *cluster.Etcd
	api        *cluster.APIServer
	kubeconfig string
	binaries   map[string]string
}

func start(t *testing.T) *machine {
	t.Helper()
	return startOn(t, "etcd")
}

// startOn is start with a version of etcd.
func startOn(t *testing.T, etcd string) *machine {
	t.Helper()
	binaries, err := cluster.Built(etcd, "kube-apiserver-1.37", "kube-controller-manager-1.37")
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, Node: node.New(t), binaries: binaries}
	m.etcd = cluster.StartEtcd(t, binaries[etcd], m.Dir())
	m.serve(m.etcd.URL)
	return m
}

// serve starts kleidi, and kube-apiserver over an etcd.
func (m *machine) serve(etcd string) {
	m.t.Helper()
	config := m.Path("encryption.yaml")
	m.write(config, m.Run("encryption-config", "--resources", resources))
	m.api = cluster.NewAPIServer(m.t, cluster.APIServerSetup{
		Binary: m.binaries["kube-apiserver-1.37"], Host: cluster.Loopback, Dir: m.Dir(), Etcds: []string{etcd}, EncryptionConfig: config,
	})
	m.ServeOpen()
	m.api.Start(m.t)
	node.Eventually(m.t, 5*time.Minute, "kube-apiserver is ready", m.api.Ready)
	m.kubeconfig = m.Path("admin.conf")
	m.write(m.kubeconfig, cluster.AdminKubeconfig(m.api.URL, m.Path("certificates/apiserver.crt"), m.api.Token))
}

func (m *machine) write(file string, b []byte) {
	m.t.Helper()
	if err := os.WriteFile(file, b, 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// kleidi runs the command line, and returns its exit code.
func (m *machine) kleidi(args ...string) (stdout string, code int) {
	m.t.Helper()
	cmd := exec.Command(node.Binary(m.t), append([]string{"--config", m.Path("config.yaml")}, args...)...)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		m.t.Fatal(err)
	}
	if problems.Len() > 0 {
		m.t.Logf("kleidi %s: %s", strings.Join(args, " "), &problems)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// usage runs kleidi usage, which must end with the given exit code, and compares its
// counts with the raw values.
func (m *machine) usage(code int, args ...string) usage.Usage {
	m.t.Helper()
	out, got := m.kleidi(append([]string{"usage", "-o", "json", "--resources", resources}, args...)...)
	var u usage.Usage
	if err := json.Unmarshal([]byte(out), &u); err != nil {
		m.t.Fatalf("exit code %d: %v", got, err)
	}
	if got != code {
		m.t.Fatalf("exit code %d, want %d: %s", got, code, out)
	}
	return u
}

// raw counts key IDs in etcd's raw values, by resource, without a parser: a key ID has
// 55 bytes, and protobuf puts its field's number and its length before it.
func (m *machine) raw() map[string]map[string]int {
	m.t.Helper()
	values, err := m.etcd.Get("/registry/")
	if err != nil {
		m.t.Fatal(err)
	}
	all := map[string]map[string]int{}
	for key, value := range values {
		resource := strings.Split(key, "/")[2]
		if resource == "stable.example.com" {
			resource = "crontabs.stable.example.com"
		}
		id := "clear"
		if bytes.HasPrefix(value, []byte("k8s:enc:")) {
			at := bytes.Index(value, []byte("\x12\x37k1-"))
			if at < 0 {
				m.t.Fatalf("%s: no key ID in %.80q", key, value)
			}
			id = string(value[at+2 : at+2+55])
		}
		if all[resource] == nil {
			all[resource] = map[string]int{}
		}
		all[resource][id]++
	}
	return all
}

// compare compares a report with the raw values.
func (m *machine) compare(s usage.Store) {
	m.t.Helper()
	want := m.raw()
	for _, name := range strings.Split(resources, ",") {
		got := map[string]int{}
		for _, r := range s.Resources {
			for _, c := range r.Keys {
				if id := c.ID; r.Name == name {
					if id == "" {
						id = "clear"
					}
					got[id] += c.Objects
				}
			}
		}
		if !maps.Equal(got, want[name]) {
			m.t.Errorf("%s: usage counts %v, etcd holds %v", name, got, want[name])
		}
	}
}

// store writes the objects, several at once.
func (m *machine) store() {
	m.t.Helper()
	group := map[string]any{"group": "stable.example.com", "scope": "Namespaced",
		"names": map[string]any{"plural": "crontabs", "singular": "crontab", "kind": "CronTab"},
		"versions": []any{map[string]any{"name": "v1", "served": true, "storage": true,
			"schema": map[string]any{"openAPIV3Schema": map[string]any{"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}}
	crd := map[string]any{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
		"metadata": map[string]string{"name": "crontabs.stable.example.com"}, "spec": group}
	if err := m.api.Do(http.MethodPost, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd, nil); err != nil {
		m.t.Fatal(err)
	}
	node.Eventually(m.t, 2*time.Minute, "CronTabs are served", func() error { _, err := m.api.Get(cronTabs); return err })
	work := make(chan func() error)
	var workers sync.WaitGroup
	for range 8 {
		workers.Go(func() {
			for f := range work {
				if err := cluster.Soon(f); err != nil {
					m.t.Error(err)
				}
			}
		})
	}
	for i := range *count {
		name := fmt.Sprint("o-", i)
		work <- func() error { return m.api.Put("secrets", name, map[string]string{"password": name}) }
		if i%2 == 0 {
			work <- func() error { return m.api.Put("configmaps", name, map[string]string{"setting": name}) }
		}
		if i%20 == 0 {
			work <- func() error { return m.cronTab(name) }
		}
	}
	close(work)
	workers.Wait()
}

func (m *machine) cronTab(name string) error {
	err := m.api.Do(http.MethodPost, cronTabs, map[string]any{"apiVersion": "stable.example.com/v1", "kind": "CronTab",
		"metadata": map[string]string{"name": name}, "spec": map[string]string{"cron": "* * * * *"}}, nil)
	if r, ok := err.(*cluster.Refusal); ok && r.Code == http.StatusConflict {
		return nil // a call without an answer has made it
	}
	return err
}

// waitEncrypts waits until kube-apiserver encrypts under a key ID.
func (m *machine) waitEncrypts(keyID string) {
	m.t.Helper()
	node.Eventually(m.t, 4*time.Minute, "kube-apiserver encrypts under the current key", func() error {
		if err := m.api.Ready(); err != nil { // the health check asks for the plugin's status
			return err
		}
		if err := m.api.Put("secrets", "probe", map[string]string{"at": time.Now().String()}); err != nil {
			return err
		}
		values, err := m.etcd.Get("/registry/secrets/" + cluster.Namespace + "/probe")
		for _, v := range values {
			if bytes.Contains(v, []byte(keyID)) {
				return nil
			}
		}
		return errors.Join(errors.New("still the former key"), err)
	})
}

// TestObjects: every object is found under its key before a rotation, after it, in the
// middle of a migration and after it; live and in snapshots.
func TestObjects(t *testing.T) {
	m := start(t)
	m.store()
	first := m.Keyring().Current.KeyID
	// The first Secrets of a kube-apiserver that has just started are encrypted as well.
	u := m.usage(0, "--etcd", m.etcd.URL)
	m.compare(u.Stores[0])
	if n := u.Stores[0].KeyIDs()[first]; n < *count*3/2 {
		t.Errorf("%d objects are under the first key, want at least %d", n, *count*3/2)
	}
	m.Run("keyring", "backup", m.Path("early.json"))

	m.Run("rotate")
	second := m.Keyring().Current.KeyID
	m.waitEncrypts(second)
	u = m.usage(4, "--etcd", m.etcd.URL)
	m.compare(u.Stores[0])
	if ids := u.Stores[0].KeyIDs(); ids[second] == 0 || ids[first] < *count || u.Left != ids[first] {
		t.Errorf("after the rotation: %v, %d left", ids, u.Left)
	}

	before := m.Path("before.db")
	m.etcd.Snapshot(t, before)
	s := m.usage(4, "--snapshot", before)
	m.compare(s.Stores[0])
	if info := s.Stores[0].Snapshot; info == nil || !info.Checked || info.Etcd != "3.6" {
		t.Errorf("the snapshot: %+v", info)
	}
	m.checks(0, before)
	m.checks(4, before, "--keyring", m.Path("early.json")) // the objects stored since then

	m.refused("prune", "holds", "objects under it; run kleidi migrate", m.prune(first))

	t.Run("dry run", m.dryRun)
	out, code := m.kleidi("migrate", "--kubeconfig", m.kubeconfig, "--by", "patch", "--resources", resources, "--rate", "2000")
	if code != 0 {
		t.Fatalf("migrate: exit code %d: %s", code, out)
	}
	u = m.usage(0, "--etcd", m.etcd.URL)
	m.compare(u.Stores[0])
	if ids := u.Stores[0].KeyIDs(); len(ids) != 1 || u.Left != 0 {
		t.Errorf("after the migration: %v, %d left", ids, u.Left)
	}
	after := m.Path("after.db")
	m.etcd.Snapshot(t, after)
	m.compare(m.usage(0, "--snapshot", after).Stores[0])
	m.checks(4, after, "--keyring", m.Path("early.json"))

	t.Run("again", m.again)
	t.Run("slipped in", m.slippedIn)
	t.Run("prune", m.prunes)
	t.Run("by the API", m.byAPI)
}

func (m *machine) checks(code int, snapshot string, args ...string) {
	m.t.Helper()
	if out, got := m.kleidi(append([]string{"keyring", "check", "--snapshot", snapshot}, args...)...); got != code {
		m.t.Errorf("keyring check %v: exit code %d, want %d: %s", args, got, code, out)
	}
}

// dryRun: a dry run writes nothing, and names the rights that a migration needs.
func (m *machine) dryRun(t *testing.T) {
	before := m.raw()
	out, code := m.kleidi("migrate", "--kubeconfig", m.kubeconfig, "--by", "patch", "--resources", resources, "--dry-run")
	for _, want := range []string{fmt.Sprintf("crontabs.stable.example.com: %d objects would be patched", (*count+19)/20),
		"kind: ClusterRole", "apiGroups: [\"stable.example.com\"]\n    resources: [crontabs]\n    verbs: [list, patch]", "resources: [configmaps, secrets]"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("exit code %d, want %q: %s", code, want, out)
		}
	}
	if after := m.raw(); !maps.Equal(before["crontabs.stable.example.com"], after["crontabs.stable.example.com"]) {
		t.Errorf("a dry run changed %v to %v", before, after)
	}
}

// again: a second migration writes nothing.
func (m *machine) again(t *testing.T) {
	m.etcd.Snapshot(t, m.Path("1.db"))
	if out, code := m.kleidi("migrate", "--kubeconfig", m.kubeconfig, "--by", "patch", "--resources", resources, "--rate", "2000"); code != 0 {
		t.Fatalf("exit code %d: %s", code, out)
	}
	m.etcd.Snapshot(t, m.Path("2.db"))
	one, two := m.usage(0, "--snapshot", m.Path("1.db")), m.usage(0, "--snapshot", m.Path("2.db"))
	if n := two.Stores[0].Snapshot.Revisions - one.Stores[0].Snapshot.Revisions; n > *count/2 {
		t.Errorf("%d revisions were written by a migration with nothing to do", n)
	}
}

// slippedIn: an object that comes back under the former key is noticed.
func (m *machine) slippedIn(t *testing.T) {
	key := "/registry/secrets/" + cluster.Namespace + "/slipped"
	old := m.oldValue(m.Path("before.db"), m.Keyring().Retired[0].KeyID)
	if err := m.etcd.Put(key, old); err != nil {
		t.Fatal(err)
	}
	u := m.usage(4, "--etcd", m.etcd.URL)
	m.compare(u.Stores[0])
	if u.Left != 1 {
		t.Errorf("%d objects are left, want 1", u.Left)
	}
	m.refused("prune", "holds 1 object under it", "run kleidi migrate", m.prune(m.Keyring().Retired[0].KeyID))
	if err := m.etcd.Put(key, []byte("k8s\x00in clear")); err != nil {
		t.Fatal(err)
	}
	if u = m.usage(4, "--etcd", m.etcd.URL); u.Left != 1 {
		t.Errorf("%d objects are left, want 1 in the clear", u.Left)
	}
}

// oldValue takes a raw value under a key ID from the bytes of a snapshot.
func (m *machine) oldValue(snapshot, keyID string) []byte {
	m.t.Helper()
	b, err := os.ReadFile(snapshot)
	if err != nil {
		m.t.Fatal(err)
	}
	id := "\x12\x37" + keyID
	end := bytes.Index(b, []byte(id))
	begin := bytes.LastIndex(b[:max(end, 0)], []byte("k8s:enc:kms:v2:kleidi:"))
	if begin < 0 {
		m.t.Fatal("the snapshot holds no value under ", keyID)
	}
	return slices.Concat(b[begin:end+len(id)], []byte("\x1a\x04seed"))
}

func (m *machine) prune(keyID string, args ...string) []string {
	return append([]string{"prune", keyID, "--etcd", m.etcd.URL, "--yes"}, args...)
}

// refused runs a command that must fail with a message.
func (m *machine) refused(what, text, hint string, args []string) {
	m.t.Helper()
	before := m.Keyring()
	out, err := exec.Command(node.Binary(m.t), append([]string{"--config", m.Path("config.yaml")}, args...)...).CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte(text)) || !bytes.Contains(out, []byte(hint)) {
		m.t.Errorf("%s: %v, want %q and %q: %s", what, err, text, hint, out)
	}
	if after := m.Keyring(); after.Revision != before.Revision {
		m.t.Errorf("%s: the keyring was changed", what)
	}
}

// prunes: a retired KEK is removed only with proof. It then is in the archive and no
// longer in the keyring, and all stored objects can be read as before.
func (m *machine) prunes(t *testing.T) {
	k := m.Keyring()
	id, before := k.Retired[0].KeyID, m.Path("before.db")
	m.refused("prune the current KEK", "does not belong to a retired KEK", "kleidi keyring show lists the retired KEKs", m.prune(k.Current.KeyID))
	m.refused("with a snapshot that needs it", "under it", "keep the KEK as long as you keep the snapshot", m.prune(id, "--snapshot", before))
	m.refused("an etcd that is away", "etcd http://127.0.0.1:1", "see whether etcd runs", []string{"prune", id, "--etcd", "http://127.0.0.1:1", "--yes"})
	m.refused("unconfirmed", "not confirmed, because there is no terminal to ask at", "--yes", m.prune(id)[:4])
	m.write(m.Path("taken.json"), []byte("{}"))
	m.refused("an archive that exists", "this is no archive of the KEK", "--archive", m.prune(id, "--archive", m.Path("taken.json")))

	m.slippedBetween(t, id)

	archive := m.Path("archive.json")
	out, code := m.kleidi(m.prune(id, "--archive", archive, "--snapshot", m.Path("after.db"))...)
	if code != 0 || len(m.Keyring().Retired) != 0 {
		t.Fatalf("exit code %d, retired %v: %s", code, m.Keyring().Retired, out)
	}
	m.Run("keyring", "verify")
	m.checks(4, before)
	if out, code := m.kleidi("keyring", "check", "--snapshot", before, "--archive", archive); code != 4 || !strings.Contains(out, "kleidi keyring import-archive "+archive) {
		t.Errorf("exit code %d: %s", code, out)
	}
	m.checks(0, m.Path("after.db"))
	if s, err := m.api.Secret("o-0"); err != nil || s["password"] != "o-0" {
		t.Errorf("a Secret after the prune: %v, %v", s, err)
	}
	// the way back
	m.Run("keyring", "import-archive", archive, "--identity-file", m.Identity)
	m.checks(0, before)
	m.Run("rotate")
}

// byAPI: if the cluster serves StorageVersionMigration, kube-controller-manager does the
// work. A rotation has put every object under a retired KEK again.
func (m *machine) byAPI(t *testing.T) {
	const crons = "crontabs.stable.example.com"
	current := m.Keyring().Current.KeyID
	m.waitEncrypts(current)
	if left := m.raw()[crons][current]; left != 0 {
		t.Fatalf("%d CronTabs are under the current key before the migration", left)
	}
	node.Start(t, m.Path("kube-controller-manager.log"), m.binaries["kube-controller-manager-1.37"], "--kubeconfig", m.kubeconfig,
		"--controllers", "storage-version-migrator-controller,garbage-collector-controller", "--leader-elect=false", "--secure-port", "0")
	var out []byte
	// It gives up after 5 minutes, and kube-controller-manager has just been started.
	node.Again(t, 30*time.Minute, "the CronTabs are migrated", func() (err error) {
		out, err = m.Try("migrate", "--kubeconfig", m.kubeconfig, "--resources", crons)
		return err
	}, "has not begun with StorageVersionMigration")
	if !bytes.Contains(out, []byte(crons+": written again by StorageVersionMigration")) {
		t.Fatalf("migrate: %s", out)
	}
	if got := m.raw()[crons]; len(got) != 1 || got[current] != (*count+19)/20 {
		t.Errorf("after the migration: %v", got)
	}
	if list, err := m.api.Get("/apis/storagemigration.k8s.io/v1/storageversionmigrations"); err != nil || strings.Contains(list, "kleidi-") {
		t.Errorf("the migration is left behind: %s, %v", list, err)
	}
}

// slippedBetween: an object that comes back under the KEK between the proof and the
// removal is noticed. Meanwhile the command waits for its operator, at a terminal.
func (m *machine) slippedBetween(t *testing.T, keyID string) {
	key := "/registry/secrets/" + cluster.Namespace + "/slipped"
	old := m.oldValue(m.Path("before.db"), keyID)
	master, slave := openTerminal(t)
	cmd := exec.Command(node.Binary(t), "--config", m.Path("config.yaml"), "prune", keyID, "--etcd", m.etcd.URL, "--archive", m.Path("between.json"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = slave.Close()
	var shown []byte
	asked := false
	for b := make([]byte, 4096); ; {
		n, err := master.Read(b)
		shown = append(shown, b[:n]...)
		if !asked && bytes.Contains(shown, []byte("Type yes to remove the KEK: ")) {
			asked = true
			if err := m.etcd.Put(key, old); err != nil {
				t.Error(err)
			}
			if _, err := master.WriteString("yes\n"); err != nil {
				t.Error(err)
			}
		}
		if err != nil { // EIO: the command has ended
			break
		}
	}
	if err := cmd.Wait(); err == nil || !asked || !bytes.Contains(shown, []byte("holds 1 object under it")) {
		t.Errorf("asked: %v, %v: %s", asked, err, shown)
	}
	if got := m.Keyring().Retired; len(got) != 1 {
		t.Errorf("retired are %v", got)
	}
	if err := m.etcd.Put(key, []byte("k8s\x00in clear")); err != nil {
		t.Fatal(err)
	}
}

func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	return master, slave
}
