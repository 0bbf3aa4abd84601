package clusterstore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// setUp runs kleidi cluster setup on a node as an administrator would.
func (a *api) setUp(t *testing.T, n *node.Node, args ...string) setUpResult {
	t.Helper()
	var r setUpResult
	node.Again(t, 10*time.Minute, "cluster setup", func() error {
		out, err := n.Try("cluster", append([]string{"setup", "--kubeconfig", a.kubeconfig, "-o", "json"}, args...)...)
		if err != nil {
			return err
		}
		return json.Unmarshal(out, &r)
	}, node.SetUpAgain...)
	return r
}

type setUpResult struct {
	User, Server, Kubeconfig, Certificate, Key string
	KeyInTPM                                   bool
	NotAfter                                   time.Time
	Changes                                    []string
}

// as returns a client with the rights of a kubeconfig that kleidi wrote for a key in a
// file.
func as(t *testing.T, kubeconfig string) *kube.Client {
	t.Helper()
	c, err := kube.NewClient(kube.Options{Kubeconfig: kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// soon makes a call until the API has decided it. A busy API does not answer each within the
// client's 10 s.
func soon(call func() error) error { return node.Retry(call, decided) }

// decided reports whether an error is the API's answer, and not its lack of time.
func decided(err error) bool {
	if r, ok := errors.AsType[*kube.Refusal](err); ok {
		return r.Code < 500 && r.Code != http.StatusRequestTimeout && r.Code != http.StatusTooManyRequests
	}
	return errors.Is(err, store.ErrConflict) || errors.Is(err, fs.ErrNotExist)
}

// load reads the shared keyring.
func load(t *testing.T, s *kube.Store) (keyring []byte) {
	t.Helper()
	if err := soon(func() (err error) { keyring, err = s.Load(t.Context()); return err }); err != nil {
		t.Fatal(err)
	}
	return keyring
}

// swap replaces the shared keyring. A conflict is none if a call without an answer has
// replaced it.
func swap(t *testing.T, s *kube.Store, old, next []byte) {
	t.Helper()
	err := soon(func() error { return s.Swap(t.Context(), old, next) })
	if errors.Is(err, store.ErrConflict) && bytes.Equal(load(t, s), next) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
}

// remove deletes an object, which may be gone because of a call without an answer.
func remove(t *testing.T, c *kube.Client, path string) {
	t.Helper()
	err := soon(func() error { return c.Do(t.Context(), http.MethodDelete, path, "", nil, nil) })
	if err != nil && !kube.Refused(err, http.StatusNotFound) {
		t.Fatal(err)
	}
}

// TestSetup: cluster setup makes a node's access, with the key in the TPM or in a file, on the
// oldest and on the newest API. A second run changes nothing.
func TestSetup(t *testing.T) {
	for _, version := range []string{oldest, newest} {
		t.Run(version, func(t *testing.T) { testSetup(t, startVersion(t, version)) })
	}
}

func testSetup(t *testing.T, a *api) {
	t.Helper()
	cluster.StartControllerManager(t, cluster.Loopback, a.binaries["kube-controller-manager-1.37"], a.dir, a.kubeconfig, a.ca, 365*24*time.Hour)
	n := node.Make(t, node.Setup{Settings: "node: cp-1\njoin: {listen: 127.0.0.1:" + node.FreePort(t) + "}\n"})
	r := a.setUp(t, n)
	if !r.KeyInTPM || r.User != "kleidi:node:cp-1" || r.Server != a.url {
		t.Errorf("%+v", r)
	}
	if b, err := os.ReadFile(r.Key); err != nil || strings.Contains(string(b), "PRIVATE KEY") {
		t.Errorf("the key's file: %s, %v", b, err)
	}
	for _, path := range []string{r.Key, r.Certificate, r.Kubeconfig} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	t.Log("the commands that it prints are run")
	_, next, found := strings.Cut(string(n.Run("cluster", "setup", "--kubeconfig", a.kubeconfig)), "next, as root:\n")
	commands, restart, ends := strings.Cut(next, "  systemctl restart kleidi\n")
	if !found || !ends || restart != "" {
		t.Fatalf("cluster setup prints no commands to go on with: %s", next)
	}
	if out, err := exec.Command("sh", "-ec", commands).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", commands, err, out)
	}
	n.ServeOpen()
	node.Eventually(t, 2*time.Minute, "kleidi has read the certificate", func() error {
		if _, body, err := n.Get("/metrics"); err != nil || strings.Contains(body, "kleidi_cluster_certificate_end_timestamp_seconds 0\n") {
			return fmt.Errorf("it has none: %w", err)
		}
		return nil
	})
	t.Log("node remove tries with the node's own rights, which are not enough")
	n.Admit("cp-2", node.Make(t, node.Setup{Settings: "node: cp-2\n", Uninitialised: true}))
	if out, err := n.Command("node", "remove", "cp-2", "--yes", "--cut-off").CombinedOutput(); !strings.Contains(string(out), "this node may not take them away") {
		t.Errorf("node remove: %v\n%s", err, out)
	}
	if r := a.setUp(t, n); len(r.Changes) != 0 {
		t.Errorf("a second run changes %q", r.Changes)
	}
	if r := a.setUp(t, n, "--key-in-file"); r.KeyInTPM || len(r.Changes) == 0 {
		t.Errorf("the key in a file: %+v", r)
	}
	if r := a.setUp(t, n, "--key-in-file"); len(r.Changes) != 0 {
		t.Errorf("a second run changes %q", r.Changes)
	}
}

// TestRights asserts, on the real API with the node's own certificate, what a node's user
// may and may not do.
func TestRights(t *testing.T) {
	a := startAPI(t)
	cluster.StartControllerManager(t, cluster.Loopback, a.binaries["kube-controller-manager-1.37"], a.dir, a.kubeconfig, a.ca, 365*24*time.Hour)
	first, second := node.Make(t, node.Setup{Settings: "node: cp-1\n"}), node.Make(t, node.Setup{Settings: "node: cp-2\n", Uninitialised: true})
	r := a.setUp(t, first, "--key-in-file")
	a.setUp(t, second, "--key-in-file")
	s := &kube.Store{Client: as(t, r.Kubeconfig)}
	ctx := t.Context()

	swap(t, s, nil, []byte("a"))
	swap(t, s, []byte("a"), []byte("b"))
	if err := soon(func() error { return s.PutRecord(ctx, "cp-1", []byte("r")) }); err != nil {
		t.Fatal(err)
	}
	if b := load(t, s); string(b) != "b" {
		t.Errorf("the Keyring: %q", b)
	}
	var records []store.NodeRecord
	if err := soon(func() (err error) { records, err = s.Records(ctx, "cp-1", "cp-2"); return err }); err != nil || len(records) != 1 {
		t.Errorf("records: %v, %v", records, err)
	}
	archives(t, s)

	api := "/apis/" + kube.APIVersion
	request := map[string]any{"spec": map[string]any{"record": "eA=="}}
	for _, c := range []struct {
		what, method, path, kind string
		in                       any
	}{
		{"read Secrets", http.MethodGet, "/api/v1/secrets", "", nil},
		{"read a Secret", http.MethodGet, "/api/v1/namespaces/default/secrets/x", "", nil},
		{"write another node's record", http.MethodPatch, api + "/keyringnodes/cp-2", kube.MergePatch, request},
		{"make a record", http.MethodPost, api + "/keyringnodes", kube.JSON, map[string]any{"apiVersion": kube.APIVersion, "kind": "KeyringNode", "metadata": map[string]string{"name": "cp-9"}, "spec": map[string]any{}}},
		{"delete the Keyring", http.MethodDelete, api + "/keyrings/cluster", "", nil},
		{"delete all Keyrings", http.MethodDelete, api + "/keyrings", "", nil},
		{"delete its record", http.MethodDelete, api + "/keyringnodes/cp-1", "", nil},
		{"delete another node's record", http.MethodDelete, api + "/keyringnodes/cp-2", "", nil},
		{"change an archive", http.MethodPatch, api + "/keyringarchives/k1-x", kube.MergePatch, map[string]any{"spec": map[string]string{"kek": "eA=="}}},
		{"delete an archive", http.MethodDelete, api + "/keyringarchives/k1-x", "", nil},
		{"delete all archives", http.MethodDelete, api + "/keyringarchives", "", nil},
		{"list archives", http.MethodGet, api + "/keyringarchives", "", nil},
		{"change its role", http.MethodPatch, "/apis/rbac.authorization.k8s.io/v1/clusterroles/kleidi-node-cp-1", kube.MergePatch, map[string]any{"rules": []any{}}},
		{"change the definitions", http.MethodPatch, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/keyrings." + kube.Group, kube.MergePatch, map[string]any{"metadata": map[string]any{"labels": map[string]string{"a": "b"}}}},
		{"list certificate requests", http.MethodGet, "/apis/certificates.k8s.io/v1/certificatesigningrequests", "", nil},
		{"read another node's certificate request", http.MethodGet, "/apis/certificates.k8s.io/v1/certificatesigningrequests/kleidi-node-cp-2", "", nil},
		{"approve its certificate request", http.MethodPatch, "/apis/certificates.k8s.io/v1/certificatesigningrequests/kleidi-node-cp-1/approval", kube.MergePatch, map[string]any{}},
		{"delete its certificate request", http.MethodDelete, "/apis/certificates.k8s.io/v1/certificatesigningrequests/kleidi-node-cp-1", "", nil},
		{"read kube-apiserver's metrics", http.MethodGet, "/metrics", "", nil},
	} {
		if err := soon(func() error { return s.Do(ctx, c.method, c.path, c.kind, c.in, nil) }); !kube.Refused(err, http.StatusForbidden) {
			t.Errorf("the node may %s: %v", c.what, err)
		}
	}

	t.Log("its binding is deleted")
	remove(t, as(t, a.kubeconfig), "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/kleidi-node-cp-1")
	node.Eventually(t, 2*time.Minute, "the node is cut off", func() error {
		if _, err := s.Load(ctx); !kube.Refused(err, http.StatusForbidden) {
			return errors.New("it still reads the Keyring")
		}
		return nil
	})
	if err := soon(func() error { return s.Swap(ctx, []byte("b"), []byte("c")) }); err == nil {
		t.Error("it still writes the Keyring")
	}
}

// archives: a node may make the one archive of a KEK, and read it.
func archives(t *testing.T, s *kube.Store) {
	t.Helper()
	create := func(content string) error {
		return soon(func() error { return s.CreateArchive(t.Context(), "k1-x", []byte(content)) })
	}
	read := func(id string) (archive []byte, err error) {
		err = soon(func() (err error) { archive, err = s.Archive(t.Context(), id); return err })
		return archive, err
	}
	// A call without an answer may have made it.
	if err := create("archive"); err != nil && !errors.Is(err, store.ErrConflict) {
		t.Error(err)
	}
	if err := create("another"); !errors.Is(err, store.ErrConflict) {
		t.Errorf("a second archive of one KEK: %v", err)
	}
	if b, err := read("k1-x"); err != nil || string(b) != "archive" {
		t.Errorf("the archive: %q, %v", b, err)
	}
	if _, err := read("k1-y"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an archive that is not there: %v", err)
	}
}
