package clusterstore

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// encrypting starts an API whose kube-apiserver encrypts with a node's kleidi.
func encrypting(t *testing.T, n *node.Node, configuration []byte) *api {
	t.Helper()
	path := n.Path("encryption.yaml")
	if err := os.WriteFile(path, configuration, 0o600); err != nil {
		t.Fatal(err)
	}
	a := startAPI(t, "--encryption-provider-config", path)
	cluster.StartControllerManager(t, cluster.Loopback, a.binaries["kube-controller-manager-1.37"], a.dir, a.kubeconfig, a.ca, time.Hour)
	return a
}

// otherKernel boots a node in a way in which its keyring does not open.
func otherKernel(n *node.Node) {
	other := n.Kernel
	other.Kernel = "6.66-other"
	n.Reboot(other)
}

// TestColdStart: kube-apiserver starts while kleidi is locked, with Secrets encrypted.
// The node then reads the cluster store. With all resources encrypted, kube-apiserver
// becomes ready once kleidi is open, and the cluster store is still stored in the clear.
func TestColdStart(t *testing.T) {
	for _, resources := range []string{"secrets", "*.*"} {
		t.Run(resources, func(t *testing.T) {
			n := node.Make(t, node.Setup{Settings: "node: cp-1\n"})
			n.ServeOpen()
			a := encrypting(t, n, n.Run("encryption-config", "--resources", resources))
			r := a.setUp(t, n, "--key-in-file")
			s := &kube.Store{Client: as(t, r.Kubeconfig)}
			swap(t, s, nil, []byte("keyring"))
			if err := soon(func() error { return s.PutRecord(t.Context(), "cp-1", []byte("record")) }); err != nil {
				t.Fatal(err)
			}
			for key, value := range a.stored(t, "/registry/"+kube.Group+"/") {
				if bytes.HasPrefix(value, []byte("k8s:enc:")) {
					t.Errorf("%s is stored encrypted", key)
				}
			}

			t.Log("kleidi is locked, and kube-apiserver starts")
			n.Serving.Kill()
			a.server.Kill()
			otherKernel(n)
			n.Serve()
			a.launch()
			if resources == "*.*" {
				node.Eventually(t, 10*time.Minute, "kube-apiserver gives up", func() error {
					if a.server.Alive() == nil {
						return errors.New("it runs")
					}
					return nil
				})
				t.Log("kleidi is open, and kube-apiserver starts")
				n.Serving.Kill()
				n.Reboot(n.Kernel)
				n.ServeOpen()
				a.startServer(t)
			}
			running := cluster.Restarts(t)
			node.Eventually(t, 10*time.Minute, "the node reads the cluster store", func() error {
				if err := running(a.server, a.launch); err != nil {
					return err
				}
				b, err := s.Load(t.Context())
				if err == nil && string(b) != "keyring" {
					t.Fatalf("it reads %q", b)
				}
				return err
			})
		})
	}
}

// TestEncryptedStore: cluster setup refuses an API that would encrypt the cluster store.
func TestEncryptedStore(t *testing.T) {
	n := node.Make(t, node.Setup{Settings: "node: cp-1\n"})
	n.ServeOpen()
	configuration := string(n.Run("encryption-config", "--resources", "*.*"))
	_, wildcard, _ := strings.Cut(configuration, "- identity: {}\n")
	a := encrypting(t, n, []byte("apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n"+wildcard))
	_, err := n.Try("cluster", "setup", "--kubeconfig", a.kubeconfig)
	if err == nil || !strings.Contains(err.Error(), "encrypts the cluster store itself") {
		t.Errorf("cluster setup: %v", err)
	}
}
