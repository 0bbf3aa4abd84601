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

// restarting is a node with a faked /proc and a kube-apiserver.
type restarting struct {
	t      *testing.T
	proc   string
	flags  []string // the address and the certificate
	answer atomic.Int32
}

func newRestarting(t *testing.T) *restarting {
	n := &restarting{t: t, proc: t.TempDir()}
	n.answer.Store(http.StatusInternalServerError)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/readyz" {
			t.Errorf("asked for %s", r.URL)
		}
		w.WriteHeader(int(n.answer.Load()))
		_, _ = w.Write([]byte("[+]ping ok\n[-]kms-providers failed: reason withheld\n"))
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
			n.answer.Store(http.StatusOK)
		}
	}}
	if err := r.Await(ctx, file); err != nil || len(said) != 2 {
		t.Errorf("%v, said %q", err, said)
	}
	n.flags = nil
	n.run("9", "kube-apiserver", flagName+"=/etc/other.yaml")
	r.Unchanged()
	if err := r.Await(ctx, file); err != nil {
		t.Errorf("the manifest did not change, and process 7 serves: %v", err)
	}
}

// TestAwaitRefused: a kube-apiserver that starts refuses the question until it has read its
// roles. One that refuses for good counts as ready after a while.
func TestAwaitRefused(t *testing.T) {
	const file = "/etc/enc.yaml"
	for _, refusal := range []int32{http.StatusUnauthorized, http.StatusForbidden} {
		n := newRestarting(t)
		n.answer.Store(refusal)
		n.run("9", "kube-apiserver", flagName, file)
		r := &Restart{proc: n.proc, refused: map[string]time.Time{}, patience: time.Hour, Say: func(message string) {
			switch {
			case strings.Contains(message, "refused without credentials; if that lasts 1h0m0s"):
				n.answer.Store(http.StatusInternalServerError)
			case strings.HasSuffix(message, "reason withheld"):
				n.answer.Store(http.StatusOK)
			default:
				t.Errorf("said %q", message)
			}
		}}
		if err := r.Await(t.Context(), file); err != nil {
			t.Error(err)
		}
		if n.answer.Load() != http.StatusOK {
			t.Errorf("%d counts as ready", n.answer.Load())
		}
		n.answer.Store(refusal)
		r.patience = 0
		if err := r.Await(t.Context(), file); err != nil {
			t.Errorf("%d for good: %v", refusal, err)
		}
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
