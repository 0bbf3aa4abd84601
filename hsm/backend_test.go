//go:build cgo

package hsm

import (
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/cryptoki"
	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// backend is a PKCS#11 module with the test's own tokens.
type backend struct {
	name     string
	module   string
	initArgs string
	dir      string   // where its tokens are
	tokens   []string // two labels
	only     []string // mechanisms that it offers, as slots name them

}

const (
	testPIN   = "kleidi-test-1234"
	testSOPIN = "kleidi-so-5678"
)

// firstFile returns the first of these files that exists.
func firstFile(t *testing.T, paths ...string) string {
	t.Helper()
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	t.Fatalf("none of %q is there; run .ci/deps softhsm2-util nss", paths)
	return ""
}

// admin runs f with the initialised module, as a call of its own.
func admin(t *testing.T, module, initArgs string, f func(cryptoki.Functions)) {
	t.Helper()
	_, err := cryptoki.Do(t.Context(), moduleAt(module), initArgs, cryptoki.Call[int]{Run: func() (int, error) { f(moduleAt(module).Functions); return 0, nil }})
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// softHSM returns SoftHSM with two tokens in the test's own folder.
func softHSM(t *testing.T) *backend {
	t.Helper()
	dir := t.TempDir()
	ok(t, os.Mkdir(filepath.Join(dir, "tokens"), 0o700))
	conf := filepath.Join(dir, "softhsm2.conf")
	ok(t, os.WriteFile(conf, []byte("directories.tokendir = "+dir+"/tokens\nlog.level = ERROR\n"), 0o600))
	t.Setenv("SOFTHSM2_CONF", conf)
	b := &backend{name: "softhsm", dir: filepath.Join(dir, "tokens"), tokens: []string{"kleidi-a", "kleidi-b"}, only: []string{keyslot.MechGCM, keyslot.MechWrapPad},
		module: firstFile(t, "/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so")}
	for _, label := range b.tokens {
		b.initToken(t, label)
	}
	return b
}

// initToken initialises a token in the free slot of SoftHSM.
func (b *backend) initToken(t *testing.T, label string) {
	t.Helper()
	var slot uint
	admin(t, b.module, "", func(p cryptoki.Functions) {
		slots := must[[]uint](t)(p.GetSlotList(true))
		slot = slots[len(slots)-1]
		ok(t, p.(*cryptoki.Binding).InitToken(slot, testSOPIN, label))
		b.setPIN(t, p.(*cryptoki.Binding), slot, testSOPIN)
	})
}

func (b *backend) setPIN(t *testing.T, p *cryptoki.Binding, slot uint, so string) {
	t.Helper()
	h := must[pkcs11.SessionHandle](t)(p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION))
	ok(t, p.Login(h, pkcs11.CKU_SO, so))
	ok(t, p.InitPIN(h, testPIN))
	ok(t, p.Logout(h))
	ok(t, p.CloseSession(h))
}

// config returns a configuration for a key of one of the tokens, with a PIN file.
func (b *backend) config(t *testing.T, token int, key string) Config {
	t.Helper()
	pin := filepath.Join(t.TempDir(), "pin")
	ok(t, os.WriteFile(pin, []byte(testPIN+"\n"), 0o600))
	return Config{Module: b.module, InitArgs: b.initArgs, URI: fmt.Sprintf("pkcs11:token=%s;object=%s", b.tokens[token], url.PathEscape(key)), PINFile: pin, Timeout: 5 * time.Minute}
}

func newWrapper(t *testing.T, c Config, only ...string) *Wrapper {
	t.Helper()
	w := must[*Wrapper](t)(New(c))
	w.only = only
	return w
}

// generated returns a wrapper with a fresh key.
func (b *backend) generated(t *testing.T, token int, key string, only ...string) *Wrapper {
	t.Helper()
	w := newWrapper(t, b.config(t, token, key), only...)
	must[Key](t)(w.GenerateKey(t.Context()))
	return w
}

// inSession runs f in a logged-in read-write session with w's token.
func inSession(t *testing.T, w *Wrapper, f func(*session)) {
	t.Helper()
	_, err := operation[int]{flags: pkcs11.CKF_RW_SESSION, run: func(s *session) (int, error) { f(s); return 0, nil }}.do(t.Context(), w)
	ok(t, err)
}

// aesKey makes a key that may encrypt and wrap, as an administrator might make it.
func (b *backend) aesKey(t *testing.T, w *Wrapper, label string, more ...*pkcs11.Attribute) {
	t.Helper()
	inSession(t, w, func(s *session) {
		id := make([]byte, 8)
		rand.Read(id)
		template := append([]*pkcs11.Attribute{
			attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attribute(pkcs11.CKA_VALUE_LEN, keySize),
			attribute(pkcs11.CKA_LABEL, label), attribute(pkcs11.CKA_ID, id), attribute(pkcs11.CKA_TOKEN, true), attribute(pkcs11.CKA_PRIVATE, true),
			attribute(pkcs11.CKA_SENSITIVE, true), attribute(pkcs11.CKA_EXTRACTABLE, false),
		}, more...)
		must[pkcs11.ObjectHandle](t)(s.GenerateKey(s.Handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, template))
	})
}

func permissions(crypt, wrap bool) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{attribute(pkcs11.CKA_ENCRYPT, crypt), attribute(pkcs11.CKA_DECRYPT, crypt), attribute(pkcs11.CKA_WRAP, wrap), attribute(pkcs11.CKA_UNWRAP, wrap)}
}

// rsaKey makes an RSA key pair.
func (b *backend) rsaKey(t *testing.T, w *Wrapper, label string) {
	t.Helper()
	inSession(t, w, func(s *session) {
		name := []*pkcs11.Attribute{attribute(pkcs11.CKA_LABEL, label), attribute(pkcs11.CKA_ID, []byte{7}), attribute(pkcs11.CKA_TOKEN, true)}
		public := append([]*pkcs11.Attribute{attribute(pkcs11.CKA_MODULUS_BITS, keyslot.MinRSA), attribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
			attribute(pkcs11.CKA_ENCRYPT, true)}, name...)
		private := append([]*pkcs11.Attribute{attribute(pkcs11.CKA_PRIVATE, true), attribute(pkcs11.CKA_SENSITIVE, true), attribute(pkcs11.CKA_EXTRACTABLE, false),
			attribute(pkcs11.CKA_DECRYPT, true)}, name...)
		_, _, err := s.Functions.(*cryptoki.Binding).GenerateKeyPair(s.Handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)}, public, private)
		ok(t, err)
	})
}

// nss returns NSS softokn with two databases. The module opens one at a time, which an
// argument of C_Initialize names.
func nss(t *testing.T) *backend {
	t.Helper()
	t.Setenv("NSS_MAX_MP_PBE_ITERATION_COUNT", "1") // a login costs as little as elsewhere
	b := &backend{name: "nss", tokens: []string{"kleidi-a", "kleidi-a"}, only: []string{keyslot.MechGCM, keyslot.MechKWP, keyslot.MechKWPKey, keyslot.MechWrapPad, keyslot.MechOAEP},
		module: firstFile(t, "/usr/lib/x86_64-linux-gnu/libsoftokn3.so", "/usr/lib/x86_64-linux-gnu/nss/libsoftokn3.so", "/usr/lib/aarch64-linux-gnu/libsoftokn3.so", "/usr/lib64/libsoftokn3.so")}
	b.initArgs = b.database(t)
	return b
}

// database makes an empty database of NSS with a user PIN.
func (b *backend) database(t *testing.T) (initArgs string) {
	t.Helper()
	b.dir = t.TempDir()
	initArgs = fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='' flags=noModDB dbTokenDescription='%s'", b.dir, b.tokens[0])
	admin(t, b.module, initArgs, func(p cryptoki.Functions) {
		for _, slot := range must[[]uint](t)(p.GetSlotList(true)) {
			if info := must[tokenInfo](t)(p.GetTokenInfo(slot)); keyslot.Trim(info.Label) == b.tokens[0] {
				b.setPIN(t, p.(*cryptoki.Binding), slot, "")
			}
		}
	})
	return initArgs
}

type tokenInfo = pkcs11.TokenInfo

func newKEK(t *testing.T) *seal.Secret {
	t.Helper()
	kek := must[*seal.Secret](t)(seal.Memory{}.NewKEK())
	t.Cleanup(func() { kek.Close() })
	return kek
}

// opens demands that slot opens to kek.
func opens(t *testing.T, w seal.Wrapper, slot seal.Slot, kek *seal.Secret) {
	t.Helper()
	got := must[*seal.Secret](t)(w.Unwrap(t.Context(), slot))
	defer got.Close()
	if !got.Equal(kek) {
		t.Error("it opens to another KEK")
	}
}

// keyFor returns a wrapper with a fresh key that allows the mechanism.
func (b *backend) keyFor(t *testing.T, token int, label, mechanism string) *Wrapper {
	t.Helper()
	w := newWrapper(t, b.config(t, token, label), mechanism)
	if mechanism == keyslot.MechOAEP {
		b.rsaKey(t, w, label)
	} else {
		b.aesKey(t, w, label, permissions(true, true)...)
	}
	return w
}
