package recovery_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

func newOpener(t *testing.T) *recovery.Wrapper {
	t.Helper()
	identity, _, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { identity.Close() })
	w, err := recovery.NewOpener(seal.Memory{}, identity)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestConformance(t *testing.T) {
	sealtest.Run(t, func(t *testing.T) sealtest.Harness {
		return sealtest.Harness{Wrapper: newOpener(t), Other: newOpener(t)}
	})
}

// identityOf returns text as a Secret.
func identityOf(t testing.TB, text string) *seal.Secret {
	t.Helper()
	s, err := seal.Memory{}.Take([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newKEK(t testing.TB) *seal.Secret {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kek.Close() })
	return kek
}

func text(s *seal.Secret) (text string) {
	s.With(func(b []byte) { text = string(b) })
	return text
}

// TestGeneratedIdentityIsAges: age encodes a generated identity to the same text.
func TestGeneratedIdentityIsAges(t *testing.T) {
	for range 20 {
		identity, recipient, err := recovery.GenerateIdentity(seal.Memory{})
		if err != nil {
			t.Fatal(err)
		}
		defer identity.Close()
		id, err := age.ParseX25519Identity(text(identity))
		if err != nil {
			t.Fatal(err)
		}
		if id.String() != text(identity) || id.Recipient().String() != recipient {
			t.Errorf("age writes it differently")
		}
	}
}

// TestAnyRecipientOpens: the identity of each recipient opens a slot. It may be of
// either kind, and be given as text or as a file of age-keygen. Plain age opens the
// slot too.
func TestAnyRecipientOpens(t *testing.T) {
	classic := func() (string, age.Identity, string) {
		id, err := age.GenerateX25519Identity()
		if err != nil {
			t.Fatal(err)
		}
		return id.Recipient().String(), id, id.String()
	}
	postQuantum := func() (string, age.Identity, string) {
		id, err := age.GenerateHybridIdentity()
		if err != nil {
			t.Fatal(err)
		}
		return id.Recipient().String(), id, id.String()
	}
	for name, generate := range map[string]func() (string, age.Identity, string){"classic": classic, "post-quantum": postQuantum} {
		t.Run(name, func(t *testing.T) {
			var recipients, texts []string
			var ids []age.Identity
			for range recovery.MaxRecipients {
				r, id, s := generate()
				recipients, ids, texts = append(recipients, r), append(ids, id), append(texts, s)
			}
			w, err := recovery.NewWrapper(seal.Memory{}, recipients)
			if err != nil {
				t.Fatal(err)
			}
			kek := newKEK(t)
			slot, err := w.Wrap(t.Context(), kek)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := recovery.Recipients(slot); err != nil || !slices.Equal(got, recipients) {
				t.Errorf("recipients %v, %v", got, err)
			}
			for i, s := range texts {
				s = []string{s, s + "\n", "# created: today\n# public key: " + recipients[i] + "\n\n" + s + "\r\n"}[i%3]
				opener, err := w.WithIdentity(identityOf(t, s))
				if err != nil {
					t.Fatal(err)
				}
				got, err := opener.Unwrap(t.Context(), slot)
				if err != nil {
					t.Fatalf("identity %d: %v", i, err)
				}
				if !got.Equal(kek) {
					t.Errorf("identity %d opens another KEK", i)
				}
				got.Close()
				openWithAge(t, slot, ids[i], kek)
			}
			if _, err := w.Unwrap(t.Context(), slot); !errors.Is(err, seal.ErrNotMine) {
				t.Errorf("without an identity: %v", err)
			}
		})
	}
}

func openWithAge(t *testing.T, slot seal.Slot, id age.Identity, kek *seal.Secret) {
	t.Helper()
	var data struct{ Age []byte }
	if err := json.Unmarshal(slot.Data, &data); err != nil {
		t.Fatal(err)
	}
	r, err := age.Decrypt(bytes.NewReader(data.Age), id)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(r)
	if err != nil || !identityOf(t, string(plain)).Equal(kek) {
		t.Errorf("age opens the slot to something else: %v", err)
	}
}

func TestRecipientsRefused(t *testing.T) {
	identity, good, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		t.Fatal(err)
	}
	defer identity.Close()
	hybrid, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	secret := text(identity)
	for name, recipients := range map[string][]string{
		"none":           nil,
		"too many":       manyRecipients(t, recovery.MaxRecipients+1),
		"empty":          {""},
		"twice":          {good, good},
		"mixed":          {good, hybrid.Recipient().String()},
		"damaged":        {good[:len(good)-1] + map[bool]string{true: "q", false: "p"}[good[len(good)-1] != 'q']},
		"truncated":      {good[:20]},
		"SSH":            {"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA"},
		"plugin":         {"age1yubikey1qwerty"},
		"long":           {"age1" + strings.Repeat("q", 1<<16)},
		"identity":       {secret},
		"small identity": {strings.ToLower(secret)},
		"half identity":  {secret[16:]},
	} {
		_, err := recovery.NewWrapper(seal.Memory{}, recipients)
		if err == nil || !strings.Contains(err.Error(), "name ") || len(err.Error()) > 200 {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if strings.Contains(strings.ToUpper(err.Error()), secret[16:30]) {
			t.Errorf("%s: the error quotes the identity: %v", name, err)
		}
		for mistake, says := range map[string]string{"identity": "a secret identity", "small identity": "a secret identity", "long": "more than 2048 characters"} {
			if name == mistake && !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v does not say %q", name, err, says)
			}
		}
	}
}

func manyRecipients(t *testing.T, n int) (recipients []string) {
	t.Helper()
	for range n {
		identity, recipient, err := recovery.GenerateIdentity(seal.Memory{})
		if err != nil {
			t.Fatal(err)
		}
		identity.Close()
		recipients = append(recipients, recipient)
	}
	return recipients
}

func TestIdentitiesRefused(t *testing.T) {
	good, recipient, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		t.Fatal(err)
	}
	defer good.Close()
	s := text(good)
	typo := []byte(s)
	typo[40] = map[bool]byte{true: 'Q', false: 'P'}[typo[40] != 'Q']
	for name, bad := range map[string]string{
		"recipient":   recipient,
		"one letter":  string(typo),
		"truncated":   s[:73],
		"longer":      s + "Q",
		"lower case":  strings.ToLower(s),
		"two":         s + "\n" + s,
		"comments":    "# nothing\n\n",
		"white space": " \n",
		"not ASCII":   s[:30] + "\u00e9" + s[32:],
		"digit":       s[:30] + "1" + s[31:],
		"unknown":     "AGE-PLUGIN-YUBIKEY-" + s[15:],
	} {
		_, err := recovery.NewOpener(seal.Memory{}, identityOf(t, bad))
		e, ok := errors.AsType[*seal.Error](err)
		if !ok || e.Cause != seal.CauseCredentials || e.Hint == "" {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for i := 16; i+6 <= len(s); i++ {
			if strings.Contains(strings.ToUpper(err.Error()), s[i:i+6]) {
				t.Errorf("%s: the error quotes the identity: %v", name, err)
			}
		}
	}
	closed := identityOf(t, s)
	closed.Close()
	for _, none := range []*seal.Secret{nil, closed} {
		if _, err := recovery.Recipient(none); seal.CauseOf(err) != seal.CauseCredentials {
			t.Errorf("no identity: %v", err)
		}
	}
}

// TestOtherPayloads: an age file for the right identity is refused if it holds no KEK.
func TestOtherPayloads(t *testing.T) {
	identity, recipient, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		t.Fatal(err)
	}
	defer identity.Close()
	opener, err := recovery.NewOpener(seal.Memory{}, identity)
	if err != nil {
		t.Fatal(err)
	}
	for n, want := range map[int]seal.Cause{0: seal.CauseSlotCorrupt, 31: seal.CauseSlotCorrupt, 32: "", 33: seal.CauseSlotCorrupt, 8000: seal.CauseSlotCorrupt} {
		if _, err := opener.Unwrap(t.Context(), ageSlot(t, recipient, make([]byte, n))); seal.CauseOf(err) != want {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func ageSlot(t testing.TB, recipient string, plain []byte) seal.Slot {
	t.Helper()
	r, err := age.ParseX25519Recipient(recipient)
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	w, err := age.Encrypt(&file, r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(plain); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(map[string]any{"recipients": []string{recipient}, "age": file.Bytes()})
	if err != nil {
		t.Fatal(err)
	}
	return seal.Slot{Type: seal.TypeRecovery, Data: data}
}

func TestSlotForm(t *testing.T) {
	opener := newOpener(t)
	slot, err := opener.Wrap(t.Context(), newKEK(t))
	if err != nil {
		t.Fatal(err)
	}
	s := string(slot.Data)
	for name, data := range map[string]string{
		"unknown field":    strings.Replace(s, `{`, `{"plugin":"x",`, 1),
		"duplicate field":  strings.Replace(s, `"age":`, `"age":"","age":`, 1),
		"other case":       strings.Replace(s, `"age":`, `"Age":`, 1),
		"trailing bytes":   s + "{}",
		"oversize":         strings.Repeat(" ", seal.MaxSlotData) + s,
		"many recipients":  strings.Replace(s, `[`, `[`+strings.Repeat(`"",`, recovery.MaxRecipients), 1),
		"recipient object": strings.Replace(s, `[`, `[{},`, 1),
	} {
		damaged := seal.Slot{Type: slot.Type, Data: []byte(data)}
		if _, err := opener.Unwrap(t.Context(), damaged); seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := recovery.Recipients(damaged); seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Errorf("%s: recipients: %v", name, err)
		}
	}
	if _, err := recovery.Recipients(seal.Slot{Type: seal.TypeTPM, Data: slot.Data}); !errors.Is(err, seal.ErrNotMine) {
		t.Error(err)
	}
}

// TestNothingOutsideLockedMemory: neither the KEK nor the text of the identity stays in
// memory that a core file would show.
func TestNothingOutsideLockedMemory(t *testing.T) {
	watch := sealtest.NewWatch()
	identity, _, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		t.Fatal(err)
	}
	defer identity.Close()
	watch.Add("identity", identity)
	opener, err := recovery.NewOpener(seal.Memory{}, identity)
	if err != nil {
		t.Fatal(err)
	}
	kek := newKEK(t)
	watch.Add("KEK", kek)
	for range 3 {
		slot, err := opener.Wrap(t.Context(), kek)
		if err != nil {
			t.Fatal(err)
		}
		got, err := opener.Unwrap(t.Context(), slot)
		if err != nil {
			t.Fatal(err)
		}
		watch.Add("KEK", got)
		defer got.Close()
	}
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("found:\n%s", strings.Join(found, "\n"))
	}
}

// FuzzUnwrap: no slot data makes Unwrap panic, hang or return another KEK.
func FuzzUnwrap(f *testing.F) {
	identity, recipient, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		f.Fatal(err)
	}
	opener, err := recovery.NewOpener(seal.Memory{}, identity)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(ageSlot(f, recipient, make([]byte, 32)).Data))
	f.Add([]byte(ageSlot(f, recipient, make([]byte, 33)).Data))
	f.Add([]byte(`{"recipients":[],"age":""}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		kek, err := opener.Unwrap(t.Context(), seal.Slot{Type: seal.TypeRecovery, Data: data})
		if err == nil {
			defer kek.Close()
			if !kek.Equal(identityOf(t, string(make([]byte, 32)))) {
				t.Errorf("another KEK from %q", data)
			}
			return
		}
		if seal.CauseOf(err) != seal.CauseSlotCorrupt && !errors.Is(err, seal.ErrNotMine) {
			t.Error(err)
		}
	})
}
