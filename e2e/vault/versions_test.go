package vault

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault"
)

func version(t *testing.T, slot seal.Slot) int {
	t.Helper()
	v, err := vault.Version(slot)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func check(t *testing.T, w *vault.Wrapper, slot seal.Slot) string {
	t.Helper()
	warnings, err := w.Check(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(warnings, "\n")
}

// TestVersions: a slot survives the key's rotation and is moved to the newest version.
// A setting that would lock the slot out is found before it does.
func TestVersions(t *testing.T) {
	f := newScene(t, appRoleAuth)
	if v := version(t, f.slot); v != 1 {
		t.Fatalf("version %d, want 1", v)
	}
	if said := check(t, f.w, f.slot); said != "" {
		t.Errorf("a sound key: %s", said)
	}
	f.must("transit/keys/kleidi/rotate", nil)
	checkOpens(t, f.w, f.slot, f.kek)
	if said := check(t, f.w, f.slot); !strings.Contains(said, "run kleidi slot rewrap NAME before you raise min_decryption_version") {
		t.Errorf("after a rotation: %q", said)
	}
	moved, err := f.w.Rewrap(t.Context(), f.slot)
	if err != nil {
		t.Fatal(err)
	}
	if v := version(t, moved); v != 2 {
		t.Errorf("version %d after a rewrap, want 2", v)
	}
	checkOpens(t, f.w, moved, f.kek)
	if v := version(t, wrap(t, f.w, f.kek)); v != 2 {
		t.Errorf("version %d of a new slot, want 2", v)
	}
	f.must("transit/keys/kleidi/config", map[string]any{"min_decryption_version": 2})
	if said := check(t, f.w, f.slot); !strings.Contains(said, "the slot doesn't open") || !strings.Contains(said, "min_decryption_version=1") {
		t.Errorf("a version that is locked out: %q", said)
	}
	_, err = f.w.Rewrap(t.Context(), f.slot)
	checkError(t, "Rewrap", err, seal.CauseUnavailable, vault.ErrTooOld, "lower min_decryption_version")
	checkOpens(t, f.w, moved, f.kek)
	if said := check(t, f.w, moved); said != "" {
		t.Errorf("the moved slot: %s", said)
	}
}

// TestWarnings: Check reports problems in a key's settings and in the token's rights.
func TestWarnings(t *testing.T) {
	f := newScene(t, appRoleAuth)
	f.must("transit/keys/kleidi/config", map[string]any{"deletion_allowed": true})
	f.rules(strings.ReplaceAll(documentedRules(t), `["update"]`, `["create", "update"]`))
	said := check(t, f.w, f.slot)
	for _, want := range []string{"can be deleted; run vault write transit/keys/kleidi/config deletion_allowed=false",
		"can create a Transit key if kleidi is missing"} {
		if !strings.Contains(said, want) {
			t.Errorf("no warning %q in %q", want, said)
		}
	}
	f.must("transit/keys/kleidi/config", map[string]any{"exportable": true})
	if said := check(t, f.w, f.slot); !strings.Contains(said, "can leave the server") {
		t.Errorf("an exportable key: %q", said)
	}
	f.rules(strings.Replace(documentedRules(t), "transit/keys/", "transit/nothing/", 1))
	if said := check(t, f.w, f.slot); !strings.Contains(said, "grant the capability read on transit/keys/kleidi") {
		t.Errorf("without the right to read: %q", said)
	}
}

// TestKeyNeedsContext: a derived key can't be used, and the error says so.
func TestKeyNeedsContext(t *testing.T) {
	f := newScene(t, appRoleAuth)
	f.must("transit/keys/derived", map[string]any{"derived": true})
	f.rules(strings.ReplaceAll(documentedRules(t), "/kleidi", "/derived"))
	c := f.config()
	c.Key, c.Auth = "derived", f.auth
	_, err := f.wrapper(c).Wrap(t.Context(), f.kek)
	checkError(t, "Wrap", err, seal.CauseUnavailable, nil, "missing 'context'", "can encrypt without a context")
}

// TestStandby: a standby redirects the request to the active server, whose certificate
// must come from the same CA.
func TestStandby(t *testing.T) {
	port := node.FreePort(t)
	s := newServer(t, "-standby", "127.0.0.1:"+port)
	c := s.config()
	c.Auth = appRoleAuth(s)
	active, kek := s.wrapper(c), newKEK(t)
	slot := wrap(t, active, kek)
	c.Address = "https://127.0.0.1:" + port
	w := s.wrapper(c)
	redirects(t, s, c.Address)
	node.Eventually(t, 2*time.Minute, "the standby sends to the active server", func() error {
		got, err := w.Unwrap(t.Context(), slot)
		if err != nil {
			return err
		}
		defer got.Close()
		if !got.Equal(kek) {
			return errors.New("another KEK")
		}
		return nil
	})
	checkOpens(t, w, wrap(t, w, kek), kek)
}

// redirects waits until a server redirects every request to the active one.
func redirects(t *testing.T, s *server, url string) {
	t.Helper()
	direct := s.client("").CloneConfig().HttpClient
	direct.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	node.Eventually(t, 2*time.Minute, "the standby redirects", func() error {
		res, err := direct.Get(url + "/v1/transit/keys/kleidi")
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if location := res.Header.Get("Location"); res.StatusCode != http.StatusTemporaryRedirect || !strings.HasPrefix(location, s.url) {
			return fmt.Errorf("status %d, location %q", res.StatusCode, location)
		}
		return nil
	})
}

// TestRestart: a wrapper survives a restart of its server, and a wrapper made while the
// server was down works once the server is up.
func TestRestart(t *testing.T) {
	f := newScene(t, appRoleAuth)
	f.Stop()
	c := f.config()
	c.Auth = f.auth
	early := f.wrapper(c)
	_, err := early.Unwrap(t.Context(), f.slot)
	checkError(t, "Unwrap", err, seal.CauseUnavailable, nil, "connection refused")
	f.start()
	checkOpens(t, early, f.slot, f.kek)
	checkOpens(t, f.w, f.slot, f.kek)
}

// TestRateLimitPasses: the wrapper waits for a quota that is used up for a moment.
func TestRateLimitPasses(t *testing.T) {
	f := newScene(t, tokenAuth)
	f.must("sys/quotas/config", map[string]any{"enable_rate_limit_response_headers": true})
	f.must("sys/quotas/rate-limit/all", map[string]any{"rate": 1, "interval": "1s", "path": "transit/"})
	for range 3 {
		checkOpens(t, f.w, wrap(t, f.w, f.kek), f.kek)
	}
	f.must("sys/quotas/rate-limit/all", map[string]any{"rate": 1, "interval": "1h", "path": "transit/"})
	_, _ = f.w.Wrap(t.Context(), f.kek)
	c := f.config()
	c.Auth, c.Timeout = f.auth, 5*time.Minute
	patient := f.wrapper(c)
	began := time.Now()
	_, err := patient.Wrap(t.Context(), f.kek)
	checkError(t, "Wrap", err, seal.CauseUnavailable, vault.ErrRateLimited, "limits the rate")
	if d := time.Since(began); d > 2*time.Minute {
		t.Errorf("it waits %s for what is said to take an hour", d)
	}
}

// TestLeastPrivilege: each of the documented rules is necessary, and they allow nothing
// else.
func TestLeastPrivilege(t *testing.T) {
	f := newScene(t, appRoleAuth)
	rules := documentedRules(t)
	for _, row := range []struct {
		path string
		use  func() error
	}{
		{"transit/encrypt/kleidi", func() error { _, err := f.w.Wrap(t.Context(), f.kek); return err }},
		{"transit/decrypt/kleidi", func() error { _, err := f.w.Unwrap(t.Context(), f.slot); return err }},
		{"transit/rewrap/kleidi", func() error { _, err := f.w.Rewrap(t.Context(), f.slot); return err }},
	} {
		if err := row.use(); err != nil {
			t.Errorf("%s: %v", row.path, err)
		}
		line := regexp.MustCompile(`(?m)^path "` + row.path + `".*\n`)
		if !line.MatchString(rules) {
			t.Fatalf("docs/vault.md has no rule for %s", row.path)
		}
		f.rules(line.ReplaceAllString(rules, ""))
		checkError(t, "without "+row.path, row.use(), seal.CauseCredentials, vault.ErrDenied, `"update" on the path "`+row.path+`"`)
		f.rules(rules)
	}
	token := f.must("auth/token/create", map[string]any{"policies": []string{"kleidi"}, "no_default_policy": true}).Auth.ClientToken
	c := f.client(token)
	for _, path := range []string{"transit/keys/kleidi/rotate", "transit/keys/kleidi/config", "transit/keys/new", "transit/encrypt/new",
		"transit/datakey/plaintext/kleidi", "sys/mounts/other", "auth/token/create"} {
		if _, err := c.Logical().WriteWithContext(t.Context(), path, map[string]any{"plaintext": "AAAA"}); err == nil {
			t.Errorf("the documented rules allow %s", path)
		}
	}
	if _, err := c.Logical().ReadWithContext(t.Context(), "transit/export/encryption-key/kleidi"); err == nil {
		t.Error("the documented rules allow an export")
	}
}

// TestTokensAreGivenBack: after operations that succeed or fail, no token is left.
func TestTokensAreGivenBack(t *testing.T) {
	f := newScene(t, appRoleAuth)
	before := accessors(t, f)
	for range 5 {
		checkOpens(t, f.w, wrap(t, f.w, f.kek), f.kek)
		damaged := f.slot
		damaged.Data = json.RawMessage(strings.Replace(string(f.slot.Data), "vault:v1:", "vault:v7:", 1))
		if _, err := f.w.Unwrap(t.Context(), damaged); err == nil {
			t.Error("a damaged slot opens")
		}
	}
	// kleidi waits 2 s for a revocation, which a busy server overruns.
	if after := accessors(t, f); after > before+3 {
		t.Errorf("%d tokens before, %d after", before, after)
	}
}

func accessors(t *testing.T, f *scene) int {
	t.Helper()
	list, err := f.root.Logical().ListWithContext(t.Context(), "auth/token/accessors")
	if err != nil {
		t.Fatal(err)
	}
	return len(list.Data["keys"].([]any))
}

// TestHostileSlots: with any slot, the wrapper asks only for the configured key, and
// the result is a typed error or "not mine".
func TestHostileSlots(t *testing.T) {
	f := newScene(t, appRoleAuth)
	var parsed struct{ Ciphertext string }
	if err := json.Unmarshal(f.slot.Data, &parsed); err != nil {
		t.Fatal(err)
	}
	short := f.must("transit/encrypt/kleidi", map[string]any{"plaintext": base64.StdEncoding.EncodeToString([]byte("short"))})
	good := parsed.Ciphertext
	for name, row := range map[string]struct {
		data  string
		cause seal.Cause // empty means seal.ErrNotMine
	}{
		"another address":        {`{"format":1,"address":"https://evil.test","mount":"transit","key":"kleidi","ciphertext":"` + good + `"}`, seal.CauseSlotCorrupt},
		"another mount":          {`{"format":1,"mount":"sys/../transit","key":"kleidi","ciphertext":"` + good + `"}`, ""},
		"another key":            {`{"format":1,"mount":"transit","key":"../keys/kleidi","ciphertext":"` + good + `"}`, ""},
		"another namespace":      {`{"format":1,"namespace":"evil","mount":"transit","key":"kleidi","ciphertext":"` + good + `"}`, ""},
		"a later format":         {`{"format":2,"mount":"transit","key":"kleidi","ciphertext":"` + good + `"}`, seal.CauseSlotCorrupt},
		"two ciphertexts":        {`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"` + good + `","ciphertext":"` + good + `"}`, seal.CauseSlotCorrupt},
		"a version to come":      {`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"` + strings.Replace(good, "v1", "v99", 1) + `"}`, seal.CauseSlotCorrupt},
		"version 0":              {`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"` + strings.Replace(good, "v1", "v0", 1) + `"}`, seal.CauseSlotCorrupt},
		"no ciphertext":          {`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"vault:v1:AAAA"}`, seal.CauseSlotCorrupt},
		"json in the ciphertext": {`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"vault:v1:AAAA\",\"context\":\"AAAA"}`, seal.CauseSlotCorrupt},
		"a long ciphertext":      {`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"vault:v1:` + strings.Repeat("A", 60000) + `"}`, seal.CauseSlotCorrupt},
		"what is no KEK":         {`{"format":1,"mount":"transit","key":"kleidi","ciphertext":"` + field(t, short, "ciphertext") + `"}`, seal.CauseSlotCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			slot := seal.Slot{Type: seal.TypeVault, Data: json.RawMessage(row.data)}
			_, err := f.w.Unwrap(t.Context(), slot)
			if row.cause == "" {
				if !errors.Is(err, seal.ErrNotMine) {
					t.Errorf("%v, want ErrNotMine", err)
				}
				return
			}
			checkError(t, "Unwrap", err, row.cause, nil, "vault slot: ", "kleidi keyring restore")
		})
	}
}

// TestWrapLike: WrapLike accepts a slot of this key, and refuses a slot of another key.
func TestWrapLike(t *testing.T) {
	f := newScene(t, appRoleAuth)
	next := newKEK(t)
	slot, err := f.w.WrapLike(t.Context(), next, f.slot)
	if err != nil {
		t.Fatal(err)
	}
	checkOpens(t, f.w, slot, next)
	other := f.slot
	other.Data = json.RawMessage(strings.Replace(string(f.slot.Data), `"kleidi"`, `"other"`, 1))
	if _, err := f.w.WrapLike(t.Context(), next, other); !errors.Is(err, seal.ErrNotMine) {
		t.Errorf("a slot of another key: %v", err)
	}
}

// TestTLSNames: the configured name must be in the certificate.
func TestTLSNames(t *testing.T) {
	f := newScene(t, tokenAuth)
	c := f.config()
	c.Auth, c.ServerName = f.auth, serverName
	checkOpens(t, f.wrapper(c), f.slot, f.kek)
	c.ServerName = "other.test"
	_, err := f.wrapper(c).Unwrap(t.Context(), f.slot)
	checkError(t, "Unwrap", err, seal.CauseUnavailable, nil, `its certificate is not for "other.test"`, serverName, "set vault.serverName")
	c.ServerName = ""
	c.CAFile = ""
	_, err = f.wrapper(c).Wrap(t.Context(), f.kek)
	checkError(t, "Wrap", err, seal.CauseUnavailable, nil, "unknown authority", "set vault.caFile")
}
