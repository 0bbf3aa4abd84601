package kubeadm

import (
	"context"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// restarting is a node with a faked /proc and a kube-apiserver that may be unready.
type restarting struct {
	t     *testing.T
	proc  string
	flags []string // the address and the certificate
	ready atomic.Bool
}

func newRestarting(t *testing.T) *restarting {
	n := &restarting{t: t, proc: t.TempDir()}
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/readyz" || !n.ready.Load() {
			w.WriteHeader(500)
			_, _ = w.Write([]byte("[+]ping ok\n[-]kms-providers failed: reason withheld\n"))
		}
	}))
	t.Cleanup(s.Close)
	cert := filepath.Join(t.TempDir(), "apiserver.crt")
	if err := os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(s.Listener.Addr().String())
	n.flags = []string{"--advertise-address=" + host, "--secure-port=" + port, "--tls-cert-file", cert}
	return n
}

// run starts a process.
func (n *restarting) run(pid string, words ...string) {
	n.t.Helper()
	dir := filepath.Join(n.proc, pid)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cmdline"), []byte(strings.Join(append(words, n.flags...), "\x00")+"\x00"), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// TestAwait: the former process does not count, even if it has the file already, nor does
// another program's. A new one counts once it is ready.
func TestAwait(t *testing.T) {
	const file = "/etc/kubernetes/kleidi-encryption.yaml"
	n := newRestarting(t)
	n.run("7", "kube-apiserver", flagName+"="+file)
	n.run("8", "sh", "-c", "kube-apiserver "+flagName+"="+file)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var said []string
	r := &Restart{proc: n.proc, former: processes(n.proc), Say: func(message string) {
		said = append(said, message)
		switch {
		case strings.HasPrefix(message, "kubelet has not started"):
			n.run("9", "/usr/bin/kube-apiserver", flagName, file)
		case strings.HasSuffix(message, "/readyz: kms-providers failed: reason withheld"):
			n.ready.Store(true)
		}
	}}
	if err := r.Await(ctx, file); err != nil || len(said) != 2 {
		t.Errorf("%v, said %q", err, said)
	}
	n.flags = nil
	n.run("9", "kube-apiserver", flagName+"=/etc/other.yaml")
	r.Unchanged()
	n.ready.Store(true)
	if err := r.Await(ctx, file); err != nil {
		t.Errorf("the manifest did not change, and process 7 serves: %v", err)
	}
}

// TestAwaitGivesUp: the message says what was waited for, and where to look.
func TestAwaitGivesUp(t *testing.T) {
	n := newRestarting(t)
	n.run("7", "kube-apiserver")
	over, cancel := context.WithCancel(t.Context())
	cancel()
	r := &Restart{proc: n.proc, Say: func(string) {}}
	err := r.Await(over, "/etc/enc.yaml")
	if err == nil || !strings.Contains(err.Error(), "the manifest has the change, but kubelet has not started kube-apiserver with --encryption-provider-config=/etc/enc.yaml yet") {
		t.Error(err)
	}
}
