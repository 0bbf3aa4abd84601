package vault

import (
	"encoding/base64"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault"
)

// fault is a row of the fault matrix: the fault, the operator's message, and the
// repair. The wrapper and the slot were made before, and both work afterwards.
type fault struct {
	name  string
	cause seal.Cause
	is    error
	// says are parts of the error: the fault, and what to do next.
	says []string
	// wraps and opens say which operations fail.
	wraps, opens bool
	break_, mend func(f *scene)
}

// scene is a server, with a wrapper and a slot of the wrapper.
type scene struct {
	*server
	auth   vault.Auth
	w      *vault.Wrapper
	kek    *seal.Secret
	slot   seal.Slot
	gate   *gate
	backup string
}

// answers bounds an operation on Vault, on a busy machine. A test of a Vault that is stalled
// waits this long.
const answers = 30 * time.Second

func newScene(t *testing.T, auth func(*server) vault.Auth) *scene {
	t.Helper()
	s := newServer(t)
	f := &scene{server: s, auth: auth(s), gate: newGate(t, s.url), kek: newKEK(t)}
	c := s.config()
	c.Address, c.Auth, c.Timeout = f.gate.url, f.auth, answers
	f.w = s.wrapper(c)
	f.slot = wrap(t, f.w, f.kek)
	return f
}

func newKEK(t *testing.T) *seal.Secret {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kek.Close() })
	return kek
}

func wrap(t *testing.T, w *vault.Wrapper, kek *seal.Secret) seal.Slot {
	t.Helper()
	slot, err := w.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatalf("Wrap: %v", err)
	}
	return slot
}

func checkOpens(t *testing.T, w *vault.Wrapper, slot seal.Slot, kek *seal.Secret) {
	t.Helper()
	got, err := w.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatalf("Unwrap: %v", err)
	}
	defer got.Close()
	if !got.Equal(kek) {
		t.Fatal("Unwrap returned another KEK")
	}
}

var tokenFaults = []fault{
	{name: "down", cause: seal.CauseUnavailable, says: []string{"connection refused", "start the server, or correct vault.address"}, wraps: true, opens: true,
		break_: func(f *scene) { f.gate.shut() }, mend: func(f *scene) { f.gate.open() }},
	{name: "slow beyond the deadline", cause: seal.CauseUnavailable, says: []string{"no answer within " + answers.String(), "raise vault.timeout"}, wraps: true, opens: true,
		break_: func(f *scene) { f.gate.stall() }, mend: func(f *scene) { f.gate.open() }},
	{name: "breaks off", cause: seal.CauseUnavailable, says: []string{"the connection breaks off", "nothing in between"}, wraps: true, opens: true,
		break_: func(f *scene) { f.gate.breakOff() }, mend: func(f *scene) { f.gate.open() }},
	{name: "sealed", cause: seal.CauseUnavailable, is: vault.ErrSealed, says: []string{"it is sealed", "unseal it"}, wraps: true, opens: true,
		break_: func(f *scene) { f.must("sys/seal", nil) }, mend: func(f *scene) { f.unseal() }},
	{name: "rate-limited", cause: seal.CauseUnavailable, is: vault.ErrRateLimited, says: []string{"limits the rate", "sys/quotas/rate-limit"}, wraps: true, opens: true,
		break_: func(f *scene) {
			f.must("sys/quotas/rate-limit/all", map[string]any{"rate": 1, "interval": "1h", "path": "transit/"})
			_, _ = f.w.Wrap(f.t.Context(), f.kek) // uses up the quota
		},
		mend: func(f *scene) { f.server.remove("sys/quotas/rate-limit/all") }},
	{name: "key deleted", cause: seal.CauseKeyMissing, is: vault.ErrKeyMissing, says: []string{"there is no such Transit key", "restore the key"}, wraps: true, opens: true,
		break_: func(f *scene) {
			f.must("transit/keys/kleidi/config", map[string]any{"deletion_allowed": true, "exportable": true, "allow_plaintext_backup": true})
			backup, err := f.root.Logical().ReadWithContext(f.t.Context(), "transit/backup/kleidi")
			if err != nil {
				f.t.Fatal(err)
			}
			f.backup = field(f.t, backup, "backup")
			f.server.remove("transit/keys/kleidi")
		},
		mend: func(f *scene) { f.must("transit/restore/kleidi", map[string]any{"backup": f.backup}) }},
	{name: "engine disabled", cause: seal.CauseUnavailable, is: vault.ErrMountMissing, says: []string{"nothing is mounted there", "correct vault.mount or vault.namespace"}, wraps: true, opens: true,
		break_: func(f *scene) {
			f.must("sys/remount", map[string]any{"from": "transit", "to": "elsewhere"})
			f.waitMoved("elsewhere/")
		},
		mend: func(f *scene) {
			f.must("sys/remount", map[string]any{"from": "elsewhere", "to": "transit"})
			f.waitMoved("transit/")
		}},
	{name: "permission denied", cause: seal.CauseCredentials, is: vault.ErrDenied, says: []string{`"update" on the path "transit/encrypt/kleidi"`}, wraps: true,
		break_: func(f *scene) {
			f.rules(strings.Replace(documentedRules(f.t), "transit/encrypt/", "transit/nothing/", 1))
		},
		mend: func(f *scene) { f.rules(documentedRules(f.t)) }},
	{name: "token revoked", cause: seal.CauseCredentials, is: vault.ErrToken, says: []string{"expired, revoked", "vault.auth.tokenFile"}, wraps: true, opens: true,
		break_: func(f *scene) { f.must("auth/token/revoke", map[string]any{"token": f.read("token")}) },
		mend:   func(f *scene) { tokenAuth(f.server) }},
	{name: "token expired", cause: seal.CauseCredentials, is: vault.ErrToken, says: []string{"expired, revoked", "vault.auth.tokenFile"}, wraps: true, opens: true,
		break_: func(f *scene) {
			secret := f.must("auth/token/create", map[string]any{"policies": []string{"kleidi"}, "explicit_max_ttl": "1s"})
			f.write("token", []byte(secret.Auth.ClientToken))
			f.waitExpired(secret.Auth.ClientToken)
		},
		mend: func(f *scene) { tokenAuth(f.server) }},
	{name: "token file gone", cause: seal.CauseCredentials, says: []string{"vault.auth.tokenFile", "no such file", "put the right file there"}, wraps: true, opens: true,
		break_: func(f *scene) { f.removeFile("token") }, mend: func(f *scene) { tokenAuth(f.server) }},
	{name: "token file readable to others", cause: seal.CauseCredentials, says: []string{"mode 0644 lets others read it (run chmod 600)"}, wraps: true, opens: true,
		break_: func(f *scene) { f.chmod("token", 0o644) }, mend: func(f *scene) { f.chmod("token", 0o600) }},
	{name: "another CA", cause: seal.CauseUnavailable, says: []string{"unknown authority", "set vault.caFile"}, wraps: true, opens: true,
		break_: func(f *scene) { f.write("ca.pem", newAuthority(f.t).pem) }, mend: func(f *scene) { f.write("ca.pem", f.ca.pem) }},
	{name: "min_decryption_version too high", cause: seal.CauseUnavailable, is: vault.ErrTooOld, says: []string{"min_decryption_version is above", "lower min_decryption_version"}, opens: true,
		break_: func(f *scene) {
			f.must("transit/keys/kleidi/rotate", nil)
			f.must("transit/keys/kleidi/config", map[string]any{"min_decryption_version": 2})
		},
		mend: func(f *scene) { f.must("transit/keys/kleidi/config", map[string]any{"min_decryption_version": 1}) }},
}

// TestFaults: each fault has its cause, its text and its hint. Nothing is lost, and the
// same wrapper works again after the repair.
func TestFaults(t *testing.T) {
	f := newScene(t, tokenAuth)
	for _, row := range tokenFaults {
		t.Run(row.name, func(t *testing.T) {
			row.run(t, f)
		})
	}
}

func (row fault) run(t *testing.T, f *scene) {
	row.break_(f)
	_, err := f.w.Wrap(t.Context(), f.kek)
	row.check(t, "Wrap", row.wraps, err)
	got, err := f.w.Unwrap(t.Context(), f.slot)
	if err == nil {
		got.Close()
	}
	row.check(t, "Unwrap", row.opens, err)
	row.mend(f)
	node.Eventually(t, 2*time.Minute, "it works again", func() error {
		_, err := f.w.Wrap(t.Context(), f.kek)
		return err
	})
	checkOpens(t, f.w, f.slot, f.kek)
}

func (row fault) check(t *testing.T, operation string, fails bool, err error) {
	t.Helper()
	if !fails {
		if err != nil {
			t.Errorf("%s: %v", operation, err)
		}
		return
	}
	checkError(t, operation, err, row.cause, row.is, row.says...)
}

func checkError(t *testing.T, operation string, err error, cause seal.Cause, is error, says ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s succeeds", operation)
		return
	}
	t.Logf("%s: %v", operation, err)
	if got := seal.CauseOf(err); got != cause {
		t.Errorf("%s: cause %q, want %q", operation, got, cause)
	}
	if is != nil && !errors.Is(err, is) {
		t.Errorf("%s: the error is not %q", operation, is)
	}
	for _, text := range says {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: the error does not say %q", operation, text)
		}
	}
	if _, hint := seal.SplitHint(err); hint == "" {
		t.Errorf("%s: the error has no hint", operation)
	}
}

func (f *scene) rules(text string) {
	f.t.Helper()
	f.must("sys/policies/acl/kleidi", map[string]any{"policy": text})
}

func (f *scene) read(name string) string {
	f.t.Helper()
	b, err := os.ReadFile(f.path(name))
	if err != nil {
		f.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func (f *scene) chmod(name string, mode os.FileMode) {
	f.t.Helper()
	if err := os.Chmod(f.path(name), mode); err != nil {
		f.t.Fatal(err)
	}
}

func (f *scene) unseal() {
	f.t.Helper()
	share, err := os.ReadFile(f.path("unseal-key"))
	if err != nil {
		f.t.Fatal(err)
	}
	f.must("sys/unseal", map[string]any{"key": base64.StdEncoding.EncodeToString(share)})
}

// waitMoved waits until the engine is mounted at its new path; Vault moves it in the
// background.
func (f *scene) waitMoved(mount string) {
	f.t.Helper()
	node.Eventually(f.t, 2*time.Minute, "the engine is at "+mount, func() error {
		mounts, err := f.root.Sys().ListMountsWithContext(f.t.Context())
		if err == nil && mounts[mount] == nil {
			err = errors.New("not yet")
		}
		return err
	})
}

func (f *scene) waitExpired(token string) {
	f.t.Helper()
	c := f.client(token)
	node.Eventually(f.t, 2*time.Minute, "the token has expired", func() error {
		if _, err := c.Auth().Token().LookupSelfWithContext(f.t.Context()); err != nil {
			return nil
		}
		return errors.New("it is valid")
	})
}
