package vault

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/site"
)

// inTPM is a node of the document whose client key is in its TPM.
type inTPM struct {
	*node.Node
	d     *documented
	steps []string // the document's commands that make the key and its certificate
}

// newInTPM makes the document's commands run a kleidi on a node with a TPM.
func newInTPM(d *documented) *inTPM {
	d.t.Helper()
	n := &inTPM{Node: node.New(d.t), d: d}
	script := fmt.Sprintf("#!/bin/sh\nexec '%s' --config '%s' \"$@\"\n", node.Binary(d.t), n.Path("config.yaml"))
	if err := os.WriteFile(filepath.Join(d.bin, "kleidi"), []byte(script), 0o700); err != nil {
		d.t.Fatal(err)
	}
	// The test itself starts the services that the document restarts, with the document's
	// settings.
	for name, script := range map[string]string{"sudo": "exec \"$@\"", "systemctl": "[ \"$*\" = daemon-reload ] || [ \"$*\" = 'restart kleidi' ]"} {
		if err := os.WriteFile(filepath.Join(d.bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			d.t.Fatal(err)
		}
	}
	d.write("etc/node-ca-key.pem", d.ca.keyPEM(d.t))
	return n
}

// run runs a block, and keeps it for making the key again.
func (n *inTPM) run(block string) {
	n.d.t.Helper()
	n.steps = append(n.steps, block)
	n.d.run(block)
}

// configured follows the document: the slot is made, and opens the keyring if the TPM's
// own slot does not.
func (n *inTPM) configured(text string) {
	t := n.d.t
	t.Helper()
	// A busy machine may need more than the 15 s of an operation.
	settings := strings.NewReplacer("/etc/kleidi/vault", n.d.folder, "https://vault.example:8200", n.d.url+"\n  timeout: 1m").Replace(text)
	n.Configure(settings + "unlock: {order: [tpm, vault]}\n")
	site.WantIn(t, "slot add", string(n.Run("slot", "add", "vault")), "the KEK is wrapped by vault as well")
	site.WantIn(t, "slot test", string(n.Run("slot", "test", "vault")), "opens")
	b := n.Current()
	b.Kernel = "6.13.1"
	n.Reboot(b)
	n.opensByVault()
}

func (n *inTPM) opensByVault() {
	n.d.t.Helper()
	n.ServeOpen()
	_, body, err := n.Get("/readyz?verbose")
	if err != nil {
		n.d.t.Fatal(err)
	}
	site.WantIn(n.d.t, "readyz", body, "fallback: opened by vault")
	n.Serving.Stop()
}

// changed follows the document's way out after a change of PCR 7.
func (n *inTPM) changed(remove string) {
	t := n.d.t
	t.Helper()
	b := n.Current()
	b.Dbx = "2019-01-01"
	n.Reboot(b)
	n.Serve()
	n.WaitLocked("bound to PCR 7")
	n.Serving.Stop()
	n.d.run(remove)
	for _, step := range n.steps {
		n.d.run(step)
	}
	n.opensByVault()
}

// serve starts kleidi, opens the keyring, and seals to the present boot.
func (n *inTPM) serve() {
	n.d.t.Helper()
	n.ServeOpen()
	n.Run("reseal")
}
