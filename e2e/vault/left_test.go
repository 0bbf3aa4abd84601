package vault

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/site"
	"github.com/beezy-dev/kleidi/seal/sealtest"
	"github.com/beezy-dev/kleidi/vault"
)

// TestNothingLeft wraps this many KEKs, a tenth of them with a separate login, in this
// many goroutines at once.
const wraps, atOnce = 10000, 8

// open counts the open resources of a process.
func open(t *testing.T) (goroutines, files, sockets int) {
	t.Helper()
	names, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if target, err := os.Readlink(name); err == nil && strings.HasPrefix(target, "socket:") {
			sockets++
		}
	}
	return runtime.NumGoroutine(), len(names), sockets
}

// TestNothingLeft: after 10,000 wraps no goroutine, file, connection, locked page or
// token is left.
func TestNothingLeft(t *testing.T) {
	f := newScene(t, certAuth)
	c := f.config()
	c.Auth, c.Timeout = f.auth, time.Minute
	withLogin := f.wrapper(c)
	c.Auth = tokenAuth(f.server)
	withToken := f.wrapper(c)
	wrap(t, withLogin, f.kek)
	tokens := accessors(t, f)
	goroutines, files, sockets := open(t)
	var group sync.WaitGroup
	for range atOnce {
		group.Go(func() {
			for i := range wraps / atOnce {
				w := withToken
				if i%10 == 0 {
					w = withLogin
				}
				if _, err := w.Wrap(t.Context(), f.kek); err != nil {
					t.Errorf("Wrap: %v", err)
					return
				}
			}
		})
	}
	group.Wait()
	node.Eventually(t, 2*time.Minute, "nothing is left", func() error {
		if g, n, s := open(t); g > goroutines || n > files || s > sockets {
			return fmt.Errorf("%d goroutines, %d files, %d sockets; before %d, %d, %d", g, n, s, goroutines, files, sockets)
		}
		return nil
	})
	if left := accessors(t, f); left > tokens+wraps/100 { // of a tenth of the logins: kleidi waits only 2 s for a revocation
		t.Errorf("%d tokens before, %d after", tokens, left)
	}
}

// secretsOf lists the secrets that no message may contain: the KEK and all credentials.
func secretsOf(t *testing.T, f *scene) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	f.kek.With(func(b []byte) { all["KEK"] = bytes.Clone(b) })
	for _, name := range []string{"token", "secret-id", "jwt"} {
		if b, err := os.ReadFile(f.path(name)); err == nil {
			all[name] = bytes.TrimSpace(b)
		}
	}
	return all
}

// TestErrorsHoldNoSecret: with any fault, no error repeats a KEK or a credential.
func TestErrorsHoldNoSecret(t *testing.T) {
	for name, auth := range map[string]func(*server) vault.Auth{"token": tokenAuth, "approle": appRoleAuth, "jwt": jwtAuth} {
		t.Run(name, func(t *testing.T) {
			f := newScene(t, auth)
			secrets := secretsOf(t, f)
			try := func(what string) {
				_, err := f.w.Wrap(t.Context(), f.kek)
				site.FindIn(t, what, fmt.Sprintf("%v %+v %#v", err, err, err), secrets)
				_, err = f.w.Unwrap(t.Context(), f.slot)
				site.FindIn(t, what, fmt.Sprintf("%v %+v %#v", err, err, err), secrets)
				site.FindIn(t, what+": the wrapper", fmt.Sprintf("%v %+v", f.w, f.w), secrets)
			}
			try("working")
			f.rules(`path "nothing" { capabilities = ["read"] }`)
			try("denied")
			f.must("sys/seal", nil)
			try("sealed")
			f.gate.breakOff()
			try("broken off")
		})
	}
}

// TestMemory: after a KEK was wrapped and opened, the memory that a core file would
// show holds no copy of it. (A copy of its base64 may be left where crypto/tls grew a
// buffer; docs/vault.md says so.)
func TestMemory(t *testing.T) {
	f := newScene(t, appRoleAuth)
	kek := newKEK(t)
	watch := sealtest.NewWatch()
	watch.Add("KEK", kek)
	for range 5 {
		// Pools are empty after two collections, so buffers from them start small, and
		// grow
		runtime.GC()
		runtime.GC()
		slot := wrap(t, f.w, kek)
		checkOpens(t, f.w, slot, kek)
	}
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("found in memory: %s", strings.Join(found, "\n"))
	}
}

// TestNothingLeftInServe: the whole kleidi keeps nothing either, whether the server
// works or fails.
func TestNothingLeftInServe(t *testing.T) {
	t.Parallel()
	s := newHost(t, "[tpm, vault]")
	s.StaysSmall(func() { s.Do("slot test", "opens") })
	s.StaysSmall(func() { s.Do("rotate") })
	s.scene.write("token", []byte("hvs.of-another-server"))
	s.StaysSmall(func() { s.Refuse("rotate", "the token is expired, revoked or of another server") })
	s.scene.gate.shut()
	s.StaysSmall(func() { s.Refuse("slot test", "connection refused") })
	s.Decrypts()
}
