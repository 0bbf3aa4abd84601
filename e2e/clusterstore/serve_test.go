package clusterstore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// pair is two nodes that share their keyring through the API, each with its own rights.
type pair struct {
	*api
	admin         *kube.Store
	first, second *node.Node
}

// newPair lets a second node join the first, sets up the access of both, and waits until
// the first has handed the keyring over.
func newPair(t *testing.T) *pair {
	t.Helper()
	a := startAPI(t)
	cluster.StartControllerManager(t, cluster.Loopback, a.binaries["kube-controller-manager-1.37"], a.dir, a.kubeconfig, a.ca, 365*24*time.Hour)
	settings := "node: cp-1\njoin:\n  listen: 127.0.0.1:" + node.FreePort(t) + "\n"
	p := &pair{api: a, admin: a.client(t, nil), first: node.Make(t, node.Setup{Settings: settings}), second: node.Make(t, node.Setup{Settings: "node: cp-2\n", Uninitialised: true})}
	p.first.ServeOpen()
	p.first.Admit("cp-2", p.second)
	p.share(t, p.second, "node: cp-2\n")
	p.first.Serving.Stop()
	p.share(t, p.first, settings)
	node.Eventually(t, 2*time.Minute, "the keyring is in the store", func() error {
		_, err := p.admin.Load(t.Context())
		return err
	})
	p.inStep(t)
	return p
}

// share sets up a node's access, and restarts kleidi with it.
func (p *pair) share(t *testing.T, n *node.Node, settings string) {
	t.Helper()
	n.Configure(settings + "cluster:\n  kubeconfig: " + p.setUp(t, n).Kubeconfig + "\n")
	n.ServeOpen()
}

// inStep returns once both nodes have the same revision, and neither reports a remark.
func (p *pair) inStep(t *testing.T) {
	t.Helper()
	node.Eventually(t, 2*time.Minute, "the nodes are in step", func() error {
		if a, b := p.first.Keyring().Revision, p.second.Keyring().Revision; a != b {
			return fmt.Errorf("revisions %d and %d", a, b)
		}
		for _, n := range []*node.Node{p.first, p.second} {
			if code, body, err := n.Get("/readyz?verbose"); err != nil || code != http.StatusOK || strings.Contains(body, "cluster store") {
				return fmt.Errorf("%d %s %w", code, body, err)
			}
		}
		return nil
	})
}

// columns: kubectl get keyringnodes -o wide shows what kleidi node list shows of each node's
// record, and its endorsement key. kubectl asks the API for a table, as this does.
func (p *pair) columns(t *testing.T) {
	t.Helper()
	admin := p.client(t, func(rt http.RoundTripper) http.RoundTripper { return asTable{rt} })
	node.Eventually(t, 2*time.Minute, "the columns of kubectl are those of node list", func() error {
		var table struct {
			ColumnDefinitions []struct{ Name string }
			Rows              []struct{ Cells []any }
		}
		if err := admin.Do(t.Context(), http.MethodGet, "/apis/"+kube.APIVersion+"/keyringnodes", "", nil, &table); err != nil {
			return err
		}
		got := map[any]map[string]any{} // by the name of the node
		for _, r := range table.Rows {
			cells := map[string]any{}
			for i, c := range table.ColumnDefinitions {
				cells[c.Name] = r.Cells[i]
			}
			got[cells["Name"]] = cells
		}
		var list struct {
			Nodes []struct {
				Node, EK string
				Record   struct {
					Revision, BootStates         float64
					Anchored, Announced, Version string
				}
			}
		}
		p.first.JSON(&list, "node", "list")
		if len(list.Nodes) != 2 || len(got) != 2 {
			return fmt.Errorf("%d nodes, %d rows", len(list.Nodes), len(got))
		}
		for _, n := range list.Nodes {
			for column, want := range map[string]any{
				"Endorsement Key": n.EK, "Revision": n.Record.Revision, "Boot States": n.Record.BootStates,
				"Anchored": n.Record.Anchored, "Announced": n.Record.Announced, "Version": n.Record.Version,
			} {
				if cell := got[n.Node][column]; cell != want || want == "" || want == 0.0 {
					return fmt.Errorf("%s: %s is %v, and %v in the list", n.Node, column, cell, want)
				}
			}
			if started := fmt.Sprint(got[n.Node]["Started"]); started == "<nil>" || strings.Contains(started, "unknown") {
				return fmt.Errorf("%s: started %s", n.Node, started)
			}
		}
		return nil
	})
}

// asTable asks the API for tables.
type asTable struct{ http.RoundTripper }

func (a asTable) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
	return a.RoundTripper.RoundTrip(r)
}

// addRecipient changes the part of the keyring that all nodes share.
func addRecipient(t *testing.T, n *node.Node) (recipient string, err error) {
	t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	_, err = n.Try("slot", "add", "recovery", "--recipient", identity.Recipient().String())
	return identity.Recipient().String(), err
}

// storeAgain are the errors of a shared change that a busy API may cause: it does not answer
// within 10 s, and then the change may have been made.
var storeAgain = []string{"the cluster store did not answer whether the change was made", "context deadline exceeded", "run the command again once this node has followed"}

// change makes a change on one node, which the other must follow.
func (p *pair) change(t *testing.T, on, other *node.Node) {
	t.Helper()
	var recipient string
	node.Again(t, 2*time.Minute, "the change is made", func() (err error) {
		recipient, err = addRecipient(t, on)
		return err
	}, storeAgain...)
	node.Eventually(t, 2*time.Minute, "the other node has followed", func() error {
		if !strings.Contains(string(other.Run("slot", "list")), recipient) {
			return errors.New("it does not list " + recipient)
		}
		return nil
	})
	p.inStep(t)
}

// newer returns a keyring that claims a revision above its real one.
func newer(t *testing.T, keyring []byte, revision uint64) []byte {
	t.Helper()
	var file struct {
		Body []byte `json:"body"`
		MAC  []byte `json:"mac"`
	}
	if err := json.Unmarshal(keyring, &file); err != nil {
		t.Fatal(err)
	}
	body := bytes.Replace(file.Body, fmt.Appendf(nil, `"revision":%d`, revision), fmt.Appendf(nil, `"revision":%d`, revision+1), 1)
	if bytes.Equal(body, file.Body) {
		t.Fatalf("the keyring does not say revision %d: %s", revision, body)
	}
	file.Body = body
	b, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	return append(b, '\n')
}

// TestServe: two nodes follow each other's changes, whatever happens to the API and its
// stored data.
func TestServe(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	p.change(t, p.first, p.second)
	p.change(t, p.second, p.first)
	p.columns(t)

	t.Log("the API is away")
	p.server.Kill()
	if _, err := addRecipient(t, p.second); err == nil || !strings.Contains(err.Error(), "cluster store") {
		t.Errorf("a shared change without the API: %v", err)
	}
	p.second.Run("reseal")
	p.second.Serving.Kill()
	p.second.ServeOpen()
	p.startServer(t)
	p.inStep(t)
	p.change(t, p.second, p.first)

	t.Log("etcd is put back to an older state")
	restore := p.snapshot(t)
	p.change(t, p.first, p.second)
	want := load(t, p.admin)
	restore()
	node.Eventually(t, 2*time.Minute, "the store holds the newest keyring again", func() error {
		if got, err := p.admin.Load(ctx); err != nil || !bytes.Equal(got, want) {
			return fmt.Errorf("another keyring: %w", err)
		}
		return nil
	})
	p.change(t, p.second, p.first)
	p.change(t, p.first, p.second)

	t.Log("an administrator forges a keyring")
	good := load(t, p.admin)
	others, err := os.ReadFile(node.New(t).Path("state/keyring.json"))
	if err != nil {
		t.Fatal(err)
	}
	revision := p.first.Keyring().Revision
	for what, forged := range map[string][]byte{
		"another revision": newer(t, good, revision), "another cluster's": others, "no keyring": []byte("{}"),
	} {
		swap(t, p.admin, good, forged)
		for _, n := range []*node.Node{p.first, p.second} {
			node.Eventually(t, 2*time.Minute, "a node refuses "+what, func() error {
				if code, body, err := n.Get("/readyz?verbose"); err != nil || code != http.StatusOK || !strings.Contains(body, "cluster store") {
					return fmt.Errorf("%d %s %w", code, body, err)
				}
				return nil
			})
			if got := n.Keyring().Revision; got != revision {
				t.Errorf("%s: a node has taken revision %d", what, got)
			}
		}
		if !bytes.Equal(load(t, p.admin), forged) {
			t.Errorf("%s: a node has replaced the keyring, which nobody may overwrite", what)
		}
		swap(t, p.admin, forged, good)
		p.inStep(t)
	}
	p.change(t, p.second, p.first)

	t.Log("an administrator deletes the Keyring")
	const api = "/apis/" + kube.APIVersion
	remove(t, p.admin.Client, api+"/keyrings/cluster")
	node.Eventually(t, 2*time.Minute, "a node puts the Keyring back", func() error {
		_, err := p.admin.Load(ctx)
		return err
	})
	p.inStep(t)

	t.Log("an administrator floods the store with records")
	strangers := make(chan int)
	var writers sync.WaitGroup
	for range 8 {
		writers.Go(func() {
			for i := range strangers {
				put := func() error { return p.admin.PutRecord(ctx, fmt.Sprintf("stranger-%d", i), []byte("{}")) }
				err := put()
				for n := 0; err != nil && n < 10; n++ { // a busy API does not answer each within 10 s
					err = put()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 2000 {
		strangers <- i
	}
	close(strangers)
	writers.Wait()
	p.change(t, p.first, p.second)
}
