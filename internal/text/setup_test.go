package text

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/founding"
	"github.com/beezy-dev/kleidi/internal/slots"
	"github.com/beezy-dev/kleidi/internal/verifierd"
	"github.com/beezy-dev/kleidi/seal"
)

// TestClusterSetup: the commands that follow begin a configuration only if there is none,
// and leave one that names the kubeconfig alone.
func TestClusterSetup(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.yaml")
	r := &clusteraccess.Result{User: "kleidi:cp-1", Server: "https://127.0.0.1:6443", Kubeconfig: "/k", Certificate: "/c", NotAfter: at(1), Key: "/key", KeyInTPM: true}
	const begin, add, restart = "apiVersion: ", "cluster:\\n  kubeconfig: ", "  systemctl restart kleidi\n"
	for _, row := range []struct {
		name               string
		configured, exists bool
		beginsIt, addsTo   bool
	}{
		{"no file", false, false, true, true},
		{"a file", false, true, false, true},
		{"configured", true, true, false, false},
	} {
		if row.exists {
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		r.Configured = row.configured
		got := printed(func(w io.Writer) { ClusterSetup(w, r, file) })
		if strings.Contains(got, begin) != row.beginsIt || strings.Contains(got, add) != row.addsTo || !strings.HasSuffix(got, restart) {
			t.Errorf("%s:\n%s", row.name, got)
		}
		if !strings.Contains(got, "nothing to do: the access works\n") || !strings.Contains(got, "key            /key  (in the TPM, usable only on this machine)\n") {
			t.Errorf("%s:\n%s", row.name, got)
		}
	}
	r.Changes, r.KeyInTPM, r.WhyFile = []string{"made the key"}, false, "there is no TPM"
	got := printed(func(w io.Writer) { ClusterSetup(w, r, file) })
	if !strings.HasPrefix(got, "- made the key\nuser ") || strings.Contains(got, "nothing to do") || !strings.Contains(got, "key            /key  (a file: there is no TPM)\n") {
		t.Errorf("changed:\n%s", got)
	}
}

// TestInit: the first keyring with its slots, and the settings of an imported token. A
// token that the order does not name opens nothing, and init says so.
func TestInit(t *testing.T) {
	id := seal.ClusterID{1}
	r := &founding.InitResult{ClusterID: id, KeyID: "k1-a", Keyring: "/s/keyring.json", Node: "cp-1", Slots: []string{"tpm", "recovery"}}
	renders(t, "no TPM", func(w io.Writer) { Init(w, r, nil, nil, "start it") },
		"", "keyring /s/keyring.json made", "  cluster ID  "+id.String(), "  key ID      k1-a", "  node        cp-1", "  slot        tpm", "  slot        recovery", "", "next: start it")
	r.EK = "sha256:0123456789abcdef0123456789abcdef"
	if got := printed(func(w io.Writer) { Init(w, r, nil, nil, "") }); !strings.Contains(got, "  node        cp-1 (EK sha256:0123456789abcdef…)\n") {
		t.Errorf("with a TPM:\n%s", got)
	}
	token := &founding.Import{From: "/old.json", Token: config.PKCS11{Module: "/m.so", URI: "pkcs11:token=t", PINFile: "/pin"}}
	for order, opens := range map[string]bool{seal.TypeTPM: false, seal.TypePKCS11: true} {
		got := printed(func(w io.Writer) { Init(w, r, token, []string{order}, "") })
		if !strings.Contains(got, "  pkcs11:\n    module: /m.so\n    uri: pkcs11:token=t\n    pinFile: /pin\n") || !strings.Contains(got, "\n/old.json holds the PIN as well") {
			t.Errorf("%s:\n%s", order, got)
		}
		if strings.Contains(got, "the token opens nothing at start until unlock.order names pkcs11") == opens {
			t.Errorf("%s:\n%s", order, got)
		}
	}
}

// TestSealedPIN: the advice to remove the PIN appears only if the PIN came from a file.
func TestSealedPIN(t *testing.T) {
	p := &slots.SealedPIN{File: "/pin.sealed", Bank: "sha256"}
	without := printed(func(w io.Writer) { SealedPIN(w, p) })
	p.PINFile = "/pin"
	with := printed(func(w io.Writer) { SealedPIN(w, p) })
	if strings.Contains(without, "shred") || !strings.HasPrefix(with, without) || !strings.Contains(with, "remove it here: shred -u /pin\n") || !strings.Contains(with, "only another PIN on the token makes them worthless\n") {
		t.Errorf("%s\n%s", without, with)
	}
}

// TestVerifier: the two files that a node needs, ready to be copied.
func TestVerifier(t *testing.T) {
	renders(t, "verifier", func(w io.Writer) {
		Verifier(w, &verifierd.Report{Config: "/v.yaml", ClusterID: "c1", Listen: ":1", Certificate: "sha256:c", PublicKey: "PEM\n", NodeConfiguration: "tpm: {}\n",
			Nodes: []verifierd.Node{{Name: "cp-1", EK: "sha256:e", BootPolicy: "/p.yaml"}}})
	}, "configuration  /v.yaml", "cluster ID     c1", "listens on     :1", "certificate    sha256:c", "node           cp-1  EK sha256:e  /p.yaml", "",
		"on every node, write this to "+verifierd.PublicKeyPath+":", "", "PEM", "", "and into its configuration:", "", "tpm: {}")
}
