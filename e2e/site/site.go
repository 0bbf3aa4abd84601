// Package site is a node whose kleidi a test uses like kube-apiserver and like an
// operator. It has the fault matrix that the tests of PKCS#11 and of Vault share: what
// each user sees, what is kept, and how kleidi recovers.
package site

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// Seed is the DEK seed that must always decrypt.
var Seed = bytes.Repeat([]byte("kleidi"), 6)[:32]

// Site is a serving node.
type Site struct {
	*node.Node

	t    *testing.T
	seed *kmsapi.EncryptResponse
	said bytes.Buffer // all output of the commands
}

// New runs init and serve on a node. kleidi must open, and encrypt the seed.
func New(t *testing.T, s node.Setup) *Site {
	t.Helper()
	n := &Site{Node: node.Make(t, s), t: t}
	n.ServeOpen()
	n.EncryptSeed()
	return n
}

// In runs f, and counts its failures for t.
func (s *Site) In(t *testing.T, f func()) {
	outer := s.t
	s.t = t
	defer func() { s.t = outer }()
	f()
}

// T is the test for which failures are counted now.
func (s *Site) T() *testing.T { return s.t }

// Restart ends serve and starts it again. Afterwards kleidi is open or locked.
func (s *Site) Restart() {
	s.t.Helper()
	s.Serving.Stop()
	s.Serve()
}

// Client returns a client like kube-apiserver's.
func (s *Site) Client() kmsapi.KeyManagementServiceClient {
	s.t.Helper()
	conn, err := grpc.NewClient("unix://"+s.Path("run/kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return kmsapi.NewKeyManagementServiceClient(conn)
}

// EncryptSeed encrypts the seed again.
func (s *Site) EncryptSeed() {
	s.t.Helper()
	var err error
	if s.seed, err = s.Client().Encrypt(s.t.Context(), &kmsapi.EncryptRequest{Uid: "1", Plaintext: Seed}); err != nil {
		s.t.Fatal(err)
	}
}

// Decrypts demands that the seed decrypts.
func (s *Site) Decrypts() {
	s.t.Helper()
	r, err := s.Client().Decrypt(s.t.Context(), &kmsapi.DecryptRequest{Uid: "1", Ciphertext: s.seed.Ciphertext, KeyId: s.seed.KeyId})
	if err != nil {
		s.t.Fatalf("what was encrypted before does not decrypt: %v", err)
	}
	if !bytes.Equal(r.Plaintext, Seed) {
		s.t.Fatal("the seed decrypts to something else")
	}
}

// Do runs a command, which must succeed and print these texts.
func (s *Site) Do(command string, says ...string) string {
	s.t.Helper()
	out, err := s.try(command)
	if err != nil {
		s.t.Errorf("kleidi %s: %v", command, err)
	}
	s.WantIn("kleidi "+command, out, says...)
	return out
}

// Refuse runs a command, which must fail and print these texts.
func (s *Site) Refuse(command string, says ...string) {
	s.t.Helper()
	out, err := s.try(command)
	if err == nil {
		s.t.Errorf("kleidi %s succeeds:\n%s", command, out)
		return
	}
	s.WantIn("kleidi "+command, err.Error(), says...)
}

func (s *Site) try(command string) (string, error) {
	words := strings.Fields(command)
	out, err := s.Try(words[0], words[1:]...)
	s.said.Write(out)
	if err != nil {
		s.said.WriteString(err.Error())
	}
	return string(out), err
}

// WantIn demands these texts in a text.
func (s *Site) WantIn(where, text string, says ...string) {
	s.t.Helper()
	WantIn(s.t, where, text, says...)
}

// WantIn fails the test if these texts are not in text.
func WantIn(t testing.TB, where, text string, says ...string) {
	t.Helper()
	for _, want := range says {
		if !strings.Contains(text, want) {
			t.Errorf("%s does not say %q:\n%s", where, want, text)
		}
	}
}

// The time in which kleidi must report a fault, and the time in which it must notice
// the repair, on a busy machine. kleidi's attempts are at most a minute apart.
const notices, recovers = 5 * time.Minute, 5 * time.Minute

// WaitSays waits until /readyz has this status and contains these texts, and returns
// the body.
func (s *Site) WaitSays(status int, says ...string) (body string) {
	s.t.Helper()
	within := notices
	if status == http.StatusOK {
		within = recovers
	}
	node.Eventually(s.t, within, "readyz says "+strings.Join(says, ", "), func() error {
		code, text, err := s.Get("/readyz")
		if err != nil {
			return err
		}
		for _, want := range says {
			if code != status || !strings.Contains(text, want) {
				return fmt.Errorf("%d: %s", code, text)
			}
		}
		body = text
		return nil
	})
	return body
}

// Metric waits for a line of /metrics.
func (s *Site) Metric(line string) {
	s.t.Helper()
	node.Eventually(s.t, notices, "the metrics hold "+line, func() error {
		_, body, err := s.Get("/metrics")
		if err == nil && !strings.Contains(body, "\n"+line+"\n") {
			err = errors.New("they do not")
		}
		return err
	})
}

// Stored returns the keyring's file.
func (s *Site) Stored() []byte { return s.read("state/keyring.json") }

// Log returns the whole log of serve.
func (s *Site) Log() string {
	s.t.Helper()
	log := string(s.read("kleidi.log"))
	if !strings.Contains(log, "level=") {
		s.t.Fatalf("the log says nothing:\n%s", log)
	}
	return log
}

func (s *Site) read(name string) []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.Path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// SlotOf returns the stored slot of this type.
func (s *Site) SlotOf(kind string) seal.Slot {
	s.t.Helper()
	untrusted, err := keyring.Parse(s.Stored())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, slot := range untrusted.Slots() {
		if slot.Type == kind {
			return slot
		}
	}
	s.t.Fatalf("the keyring holds no slot of %s", kind)
	return seal.Slot{}
}

// SaidNone searches the log, which must be at debug level, and the output of all
// commands for secrets and for the seed.
func (s *Site) SaidNone(secrets map[string][]byte) {
	s.t.Helper()
	secrets["seed"] = Seed
	FindIn(s.t, "the log", s.Log(), secrets)
	FindIn(s.t, "what was printed", s.said.String(), secrets)
}

// FindIn fails the test if text contains a secret, raw or as programs print bytes.
func FindIn(t *testing.T, where, text string, secrets map[string][]byte) {
	t.Helper()
	for name, secret := range secrets {
		if len(secret) == 0 {
			t.Fatal(errors.New("there is no " + name + " to look for"))
		}
		form := sealtest.FindSecret(text, secret)
		if decimal := strings.Trim(fmt.Sprint(secret), "[]"); form == "" && strings.Contains(text, decimal) {
			form = "decimal"
		}
		if form != "" {
			t.Errorf("%s holds the %s (%s)", where, name, form)
		}
	}
}

// StaysSmall repeats something 100 times. Afterwards the serving process must hold no
// more goroutines and files than after the first few times.
func (s *Site) StaysSmall(do func()) {
	s.t.Helper()
	for range 5 {
		do()
	}
	goroutines, files := s.Value("go_goroutines"), s.Value("process_open_fds")
	for range 100 {
		do()
	}
	node.Eventually(s.t, notices, "nothing is left in serve", func() error {
		if g, f := s.Value("go_goroutines"), s.Value("process_open_fds"); g > goroutines || f > files {
			return fmt.Errorf("%d goroutines, %d files; before %d, %d", g, f, goroutines, files)
		}
		return nil
	})
}

// Value returns the value of a metric without labels.
func (s *Site) Value(metric string) (n int) {
	s.t.Helper()
	_, body, err := s.Get("/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	for l := range strings.Lines(body) {
		if text, ok := strings.CutPrefix(l, metric+" "); ok {
			if _, err := fmt.Sscan(text, &n); err != nil {
				s.t.Fatalf("%s: %v", l, err)
			}
			return n
		}
	}
	s.t.Fatalf("there is no metric %s", metric)
	return 0
}
