//go:build cgo

package hsm

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/cryptoki"
	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// faulty is a module whose calls a test can change.
type faulty struct {
	cryptoki.Functions
	slots       func([]uint) []uint
	login       func() error
	flags       uint // added to the flags of the token
	encryptInit func(pkcs11.SessionHandle)
	decrypt     func(pkcs11.SessionHandle)
	fails       bool // C_Decrypt and C_UnwrapKey fail without a reason
}

func (f *faulty) GetSlotList(present bool) ([]uint, error) {
	slots, err := f.Functions.GetSlotList(present)
	if f.slots != nil {
		slots = f.slots(slots)
	}
	return slots, err
}

func (f *faulty) GetTokenInfo(slot uint) (tokenInfo, error) {
	info, err := f.Functions.GetTokenInfo(slot)
	info.Flags |= f.flags
	return info, err
}

func (f *faulty) EncryptInit(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, k pkcs11.ObjectHandle) error {
	if f.encryptInit != nil {
		f.encryptInit(h)
	}
	return f.Functions.EncryptInit(h, m, k)
}

func (f *faulty) Decrypt(h pkcs11.SessionHandle, ciphertext []byte) ([]byte, error) {
	if f.decrypt != nil {
		f.decrypt(h)
	}
	if f.fails {
		return nil, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR)
	}
	return f.Functions.Decrypt(h, ciphertext)
}

func (f *faulty) UnwrapKey(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, k pkcs11.ObjectHandle, wrapped []byte, a []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	if f.fails {
		return 0, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR)
	}
	return f.Functions.UnwrapKey(h, m, k, wrapped, a)
}

// fault makes w use a faulty module, and returns it.
func fault(w *Wrapper) *faulty {
	f := &faulty{Functions: moduleAt(w.target.module).Functions}
	m := cryptoki.NewModule(w.target.module, f)
	w.moduleAt = func(string) *module { return m }
	return f
}

// owned replaces w's module with an empty file with this mode, owner and group. It returns
// a function that brings the module back.
func owned(t *testing.T, b *backend, w *Wrapper, mode os.FileMode, uid, gid int) func() {
	t.Helper()
	point := linked(t, w)
	copied := filepath.Join(t.TempDir(), "copy")
	ok(t, os.WriteFile(copied, nil, 0o600))
	ok(t, os.Chmod(copied, mode))
	ok(t, os.Chown(copied, uid, gid))
	point(copied)
	return func() { point(b.module) }
}

// linked makes w use its module through a symbolic link, and returns a function that
// changes the target of the link.
func linked(t *testing.T, w *Wrapper) (point func(to string)) {
	t.Helper()
	link := filepath.Join(t.TempDir(), "module.so")
	point = func(to string) {
		t.Helper()
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if to != "" {
			ok(t, os.Symlink(to, link))
		}
	}
	w.target.module = link
	return point
}

// relabel renames a key.
func relabel(t *testing.T, w *Wrapper, from, to string) {
	t.Helper()
	inSession(t, w, func(s *session) {
		k := must[*key](t)(s.findKey(&keyMatch{label: from}, ""))
		ok(t, s.Functions.(*cryptoki.Binding).SetAttributeValue(s.Handle, k.handle, []*pkcs11.Attribute{attribute(pkcs11.CKA_LABEL, to)}))
	})
}

// faultRow is one row of the fault matrix.
type faultRow struct {
	name  string
	cause seal.Cause
	text  string // in the message
	// fault causes the fault, and returns a function that ends it.
	fault func(t *testing.T, b *backend, w *Wrapper, k Key) (mend func())
}

func faultRows() []faultRow {
	return []faultRow{
		{"module missing", seal.CauseUnavailable, "no such file", func(t *testing.T, b *backend, w *Wrapper, _ Key) func() {
			point := linked(t, w)
			return func() { point(b.module) }
		}},
		{"module is text", seal.CauseUnavailable, "load the PKCS#11 module", func(t *testing.T, b *backend, w *Wrapper, _ Key) func() {
			point := linked(t, w)
			text := filepath.Join(t.TempDir(), "text")
			ok(t, os.WriteFile(text, []byte("text"), 0o600))
			point(text)
			return func() { point(b.module) }
		}},
		{"module is another library", seal.CauseUnavailable, "no C_GetFunctionList", func(t *testing.T, b *backend, w *Wrapper, _ Key) func() {
			point := linked(t, w)
			point(firstFile(t, "/lib/x86_64-linux-gnu/libm.so.6", "/lib/aarch64-linux-gnu/libm.so.6", "/lib64/libm.so.6"))
			return func() { point(b.module) }
		}},
		{"module writable by all", seal.CauseUnavailable, "copy has mode 0666, so others can change it; chmod go-w ", func(t *testing.T, b *backend, w *Wrapper, _ Key) func() {
			return owned(t, b, w, 0o666, 0, 0)
		}},
		{"module of another user", seal.CauseUnavailable, "copy belongs to UID 65534, who can change it; chown root ", func(t *testing.T, b *backend, w *Wrapper, _ Key) func() {
			return owned(t, b, w, 0o644, 65534, 0)
		}},
		{"module writable by a group", seal.CauseUnavailable, "copy has mode 0664, so others can change it; chmod go-w ", func(t *testing.T, b *backend, w *Wrapper, _ Key) func() {
			return owned(t, b, w, 0o664, 0, 65534)
		}},
		{"module in a folder that all may write", seal.CauseUnavailable, "so others can replace what is below it; chmod go-w ", func(t *testing.T, b *backend, w *Wrapper, _ Key) func() {
			mend := owned(t, b, w, 0o644, 0, 0)
			open := filepath.Dir(must[string](t)(os.Readlink(w.target.module)))
			ok(t, os.Chmod(open, 0o777))
			return func() { ok(t, os.Chmod(open, 0o700)); mend() }
		}},
		{"module busy", seal.CauseUnavailable, "is busy with a call made", func(_ *testing.T, b *backend, w *Wrapper, _ Key) func() {
			m := moduleAt(w.target.module)
			started, end := make(chan struct{}), make(chan struct{})
			go func() {
				_, _ = cryptoki.Do(context.Background(), m, b.initArgs, cryptoki.Call[int]{Run: func() (int, error) { close(started); <-end; return 0, nil }})
			}()
			<-started
			w.target.timeout = 20 * time.Millisecond
			return func() { close(end); w.target.timeout = DefaultTimeout }
		}},
		{"no token", seal.CauseUnavailable, "the module shows: none", func(_ *testing.T, _ *backend, w *Wrapper, _ Key) func() {
			f := fault(w)
			f.slots = func([]uint) []uint { return nil }
			return func() { f.slots = nil }
		}},
		{"other token", seal.CauseUnavailable, "the token is not there; the module shows: \"", func(_ *testing.T, _ *backend, w *Wrapper, _ Key) func() {
			was := w.target.token
			w.target.token = cryptoki.TokenMatch{Label: "elsewhere"}
			return func() { w.target.token = was }
		}},
		{"PIN file missing", seal.CauseCredentials, "no such file", func(t *testing.T, _ *backend, w *Wrapper, _ Key) func() {
			ok(t, os.Remove(w.config.PINFile))
			return func() { setPIN(t, w, testPIN) }
		}},
		{"PIN file for all", seal.CauseCredentials, "its mode is 0644", func(t *testing.T, _ *backend, w *Wrapper, _ Key) func() {
			ok(t, os.Chmod(w.config.PINFile, 0o644))
			return func() { ok(t, os.Chmod(w.config.PINFile, 0o600)) }
		}},
		{"PIN file in a folder that all may write", seal.CauseCredentials, "so others can replace what is below it; chmod go-w ", func(t *testing.T, _ *backend, w *Wrapper, _ Key) func() {
			open := filepath.Dir(w.config.PINFile)
			ok(t, os.Chmod(open, 0o777))
			return func() { ok(t, os.Chmod(open, 0o700)) }
		}},
		{"no PIN configured", seal.CauseCredentials, "none is configured", func(_ *testing.T, _ *backend, w *Wrapper, _ Key) func() {
			was := w.target.pin
			w.target.pin = nil
			return func() { w.target.pin = was }
		}},
		{"wrong PIN", seal.CauseCredentials, "PIN", func(t *testing.T, _ *backend, w *Wrapper, _ Key) func() {
			setPIN(t, w, wrongPIN)
			return func() { setPIN(t, w, testPIN) }
		}},
		{"key gone", seal.CauseKeyMissing, ErrNoKey.Error(), func(t *testing.T, _ *backend, w *Wrapper, k Key) func() {
			relabel(t, w, k.Label, "away")
			return func() { relabel(t, w, "away", k.Label) }
		}},
		{"two keys", seal.CauseUnavailable, "several AES keys", func(t *testing.T, b *backend, w *Wrapper, k Key) func() {
			b.aesKey(t, w, k.Label, permissions(true, false)...)
			return func() { w.target.key.id = k.ID }
		}},
		{"session killed each time", seal.CauseUnavailable, "CKR_SESSION_HANDLE_INVALID", func(t *testing.T, _ *backend, w *Wrapper, _ Key) func() {
			f := fault(w)
			kill := func(h pkcs11.SessionHandle) { ok(t, f.CloseSession(h)) }
			f.encryptInit, f.decrypt = kill, kill
			return func() { f.encryptInit, f.decrypt = nil, nil }
		}},
	}
}

// TestFaults: each fault has its own cause and explanation, and is over as soon as its
// reason is, without a restart.
func TestFaults(t *testing.T) {
	for _, b := range []*backend{softHSM(t), nss(t)} {
		for i, row := range faultRows() {
			t.Run(b.name+"/"+row.name, func(t *testing.T) {
				w := newWrapper(t, b.config(t, 0, fmt.Sprint("kek", i)))
				k := must[Key](t)(w.GenerateKey(t.Context()))
				kek := newKEK(t)
				slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
				mend := row.fault(t, b, w, k)
				refuses(t, w, slot, row.cause, row.text)
				refuses(t, w, slot, row.cause, row.text)
				mend()
				opens(t, w, slot, kek)
			})
		}
	}
}

// TestSessionKilledOnce: an operation whose session is lost is repeated in a new one.
func TestSessionKilledOnce(t *testing.T) {
	for _, b := range []*backend{softHSM(t), nss(t)} {
		w := b.generated(t, 0, "kek")
		f := fault(w)
		kill := sync.OnceFunc(func() { f.encryptInit = nil })
		f.encryptInit = func(h pkcs11.SessionHandle) { kill(); ok(t, f.CloseSession(h)) }
		kek := newKEK(t)
		slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
		f.decrypt = func(h pkcs11.SessionHandle) { f.decrypt = nil; ok(t, f.CloseSession(h)) }
		opens(t, w, slot, kek)
	}
}

// TestTokenPutBack: a token may be taken out and put back. The test moves the folder that
// holds the tokens of SoftHSM.
func TestTokenPutBack(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	kek := newKEK(t)
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
	ok(t, os.Rename(b.dir, b.dir+".away"))
	ok(t, os.Mkdir(b.dir, 0o700))
	refuses(t, w, slot, seal.CauseUnavailable, "the token is not there")
	ok(t, os.Remove(b.dir))
	ok(t, os.Rename(b.dir+".away", b.dir))
	opens(t, w, slot, kek)
}

// TestKeyDeleted: a deleted key is reported as missing, and works again once the token is
// restored from its backup.
func TestKeyDeleted(t *testing.T) {
	for _, b := range []*backend{softHSM(t), nss(t)} {
		w := b.generated(t, 0, "kek")
		kek := newKEK(t)
		slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
		backup := b.dir + ".backup"
		ok(t, os.CopyFS(backup, os.DirFS(b.dir)))
		inSession(t, w, func(s *session) { ok(t, s.DestroyObject(s.Handle, must[*key](t)(s.findKey(&w.target.key, "")).handle)) })
		refuses(t, w, slot, seal.CauseKeyMissing, ErrNoKey.Error())
		if _, err := w.Unwrap(t.Context(), slot); !errors.Is(err, ErrNoKey) {
			t.Errorf("%v is no ErrNoKey", err)
		}
		must[Key](t)(w.GenerateKey(t.Context())) // another key of that name is no help
		if _, err := w.Unwrap(t.Context(), slot); !errors.Is(err, seal.ErrNotMine) {
			t.Errorf("%v, want ErrNotMine", err)
		}
		ok(t, os.RemoveAll(b.dir))
		ok(t, os.Rename(backup, b.dir))
		opens(t, w, slot, kek)
	}
}

// TestKeyWithoutPermission: a mechanism that the key doesn't allow is not tried.
func TestKeyWithoutPermission(t *testing.T) {
	for _, b := range []*backend{softHSM(t), nss(t)} {
		for i, c := range []struct {
			crypt, wrap bool
			want        string
		}{{true, true, keyslot.MechGCM}, {true, false, keyslot.MechGCM}, {false, true, b.only[len(b.only)-1]}, {false, false, ""}} {
			w := newWrapper(t, b.config(t, 0, fmt.Sprint("kek", i)))
			b.aesKey(t, w, w.target.key.label, permissions(c.crypt, c.wrap)...)
			k, err := w.Find(t.Context())
			if b.name == "nss" && c.want == keyslot.MechOAEP {
				c.want = keyslot.MechKWPKey
			}
			if k.Mechanism != c.want || (c.want == "") != errors.Is(err, ErrNotPermitted) {
				t.Errorf("%s: encrypt %v, wrap %v: %q, %v; want %q", b.name, c.crypt, c.wrap, k.Mechanism, err, c.want)
			}
		}
	}
}

// TestAllowedMechanisms: CKA_ALLOWED_MECHANISMS limits the mechanisms too.
func TestAllowedMechanisms(t *testing.T) {
	b := softHSM(t)
	w := newWrapper(t, b.config(t, 0, "kek"))
	allowed := binary.NativeEndian.AppendUint64(nil, pkcs11.CKM_AES_KEY_WRAP_PAD)
	b.aesKey(t, w, "kek", append(permissions(true, true), attribute(pkcs11.CKA_ALLOWED_MECHANISMS, allowed))...)
	if k := must[Key](t)(w.Find(t.Context())); k.Mechanism != keyslot.MechWrapPad {
		t.Errorf("it uses %s", k.Mechanism)
	}
}

// TestSlotOrToken: the error for a damaged keyslot differs from that for a token that does
// not work, whatever the module answers to a ciphertext that does not authenticate.
func TestSlotOrToken(t *testing.T) {
	for _, b := range []*backend{softHSM(t), nss(t)} {
		for _, name := range b.only {
			t.Run(b.name+"/"+name, func(t *testing.T) {
				w := b.keyFor(t, 0, name, name)
				kek := newKEK(t)
				slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
				d := must[*keyslot.Data](t)(keyslot.Parse(slot))
				d.Ciphertext[len(d.Ciphertext)-1] ^= 1
				_, err := w.Unwrap(t.Context(), must[seal.Slot](t)(d.Slot()))
				checkFault(t, err, seal.CauseSlotCorrupt, "it does not open, but a KEK that the same key has just wrapped does")
				f := fault(w)
				f.fails = true
				_, err = w.Unwrap(t.Context(), slot)
				checkFault(t, err, seal.CauseUnavailable, "the key does not work: ")
				f.fails = false
				opens(t, w, slot, kek)
			})
		}
	}
}

// TestHang: a call that does not return makes its caller, and every later one, wait until
// its deadline. Nothing accumulates meanwhile, and after the call has returned the wrapper
// works again.
func TestHang(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	kek := newKEK(t)
	f := fault(w)
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the collector would close a forgotten Secret
	before := count(t)
	hangs, release := make(chan struct{}), make(chan struct{})
	f.decrypt = func(pkcs11.SessionHandle) { f.decrypt = nil; close(hangs); <-release }
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-hangs; cancel() }()
	_, err := w.Unwrap(ctx, slot)
	checkFault(t, err, seal.CauseUnavailable, "did not answer: context canceled")
	w.target.timeout = time.Millisecond
	for range 50 {
		_, err := w.Wrap(t.Context(), kek)
		checkFault(t, err, seal.CauseUnavailable, "no answer within 1ms")
	}
	if now := count(t); now.goroutines > before.goroutines+2 {
		t.Errorf("%d goroutines, were %d", now.goroutines, before.goroutines)
	}
	w.target.timeout = DefaultTimeout
	close(release)
	opens(t, w, slot, kek)
	settles(t, func() bool { // the KEK that came too late is closed, too
		after := count(t)
		return after.goroutines <= before.goroutines && after.secrets <= before.secrets
	})
}

// TestInitialisedByOthers: if another user of this process has initialised the module,
// kleidi does not finalise it.
func TestInitialisedByOthers(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	other := moduleAt(b.module).Functions
	ok(t, other.Initialize())
	kek := newKEK(t)
	opens(t, w, must[seal.Slot](t)(w.Wrap(t.Context(), kek)), kek)
	must[[]uint](t)(other.GetSlotList(true))
	ok(t, other.Finalize())
	opens(t, w, must[seal.Slot](t)(w.Wrap(t.Context(), kek)), kek)
}

// TestHostileSlots: nothing is loaded, opened or looked up by the content of a keyslot.
func TestHostileSlots(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	b.aesKey(t, w, "other", permissions(true, true)...)
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), newKEK(t)))
	change := func(edit func(d map[string]any)) seal.Slot {
		var d map[string]any
		ok(t, json.Unmarshal(slot.Data, &d))
		edit(d)
		return seal.Slot{Type: slot.Type, Data: must[[]byte](t)(json.Marshal(d))}
	}
	set := func(name string, value any) func(map[string]any) { return func(d map[string]any) { d[name] = value } }
	for name, s := range map[string]seal.Slot{
		"a module":             change(set("module", "/tmp/evil.so")),
		"a PIN":                change(set("pin", "1234")),
		"another form":         change(set("form", "pkcs11-v2")),
		"another mechanism":    change(set("mechanism", "aes-ecb")),
		"the wrong class":      change(set("mechanism", keyslot.MechOAEP)),
		"another key":          change(func(d map[string]any) { d["key"] = map[string]any{"label": "other"} }),
		"no key":               change(func(d map[string]any) { d["key"] = map[string]any{} }),
		"a long label":         change(func(d map[string]any) { d["key"] = map[string]any{"label": strings.Repeat("a", keyslot.MaxKeyLabel+1)} }),
		"a long ciphertext":    change(set("ciphertext", make([]byte, keyslot.MaxCiphertext+1))),
		"a short ciphertext":   change(set("ciphertext", make([]byte, seal.KEKSize))),
		"a foreign ciphertext": change(set("ciphertext", make([]byte, seal.KEKSize+gcmTag))),
		"a short IV":           change(set("iv", make([]byte, 4))),
		"no IV":                change(func(d map[string]any) { delete(d, "iv") }),
		"a node":               {Type: slot.Type, Node: "n", Data: slot.Data},
		"control characters":   change(func(d map[string]any) { d["token"] = map[string]any{"label": "\x1b[2J\n"} }),
	} {
		for what, err := range map[string]error{
			"Unwrap":   func() error { _, err := w.Unwrap(t.Context(), s); return err }(),
			"WrapLike": func() error { _, err := w.WrapLike(t.Context(), newKEK(t), s); return err }(),
		} {
			if errors.Is(err, seal.ErrNotMine) {
				continue
			}
			if what == "WrapLike" && err == nil && name == "a foreign ciphertext" {
				continue // it is still this key's slot, so the new one is too
			}
			if e, _ := errors.AsType[*seal.Error](err); e == nil && name != "control characters" {
				t.Errorf("%s of a slot with %s: %v", what, name, err)
			} else if e != nil && (e.Hint == "" || len(e.Error()) > 1000 || strings.ContainsAny(e.Error(), "\x1b\n")) {
				t.Errorf("%s of a slot with %s: %q", what, name, e)
			}
		}
	}
}

func checkFault(t *testing.T, err error, cause seal.Cause, text string) {
	t.Helper()
	e, _ := errors.AsType[*seal.Error](err)
	switch {
	case e == nil || e.Cause != cause || e.Hint == "" || !strings.Contains(err.Error(), text):
		t.Errorf("%v, want cause %s and %q", err, cause, text)
	case strings.Contains(err.Error(), testPIN) || strings.Contains(err.Error(), wrongPIN):
		t.Errorf("it shows a PIN: %v", err)
	}
}
