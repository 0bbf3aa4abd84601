package founding

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// person reads the identity from the screen, and answers each question in turn.
type person struct {
	answers []func(shown []byte) ([]byte, error)
	refuses error // to show the identity
	shown   []byte
	told    []string
}

func (p *person) ShowIdentity(identity *seal.Secret) error {
	identity.With(func(b []byte) { p.shown = append(p.shown, b...) })
	return p.refuses
}

func (p *person) AskIdentity() ([]byte, error) {
	if len(p.answers) == 0 {
		return nil, io.EOF
	}
	next := p.answers[0]
	p.answers = p.answers[1:]
	return next(append([]byte(nil), p.shown...))
}

func (p *person) Tell(message string) { p.told = append(p.told, message) }

// TestIdentityIsGivenBack: a recovery slot counts only once the operator has typed an
// identity that opens it, and nothing is made for an operator who did not keep it.
func TestIdentityIsGivenBack(t *testing.T) {
	right := func(shown []byte) ([]byte, error) { return shown, nil }
	wrong := func([]byte) ([]byte, error) { return []byte("AGE-SECRET-KEY-1"), nil }
	other := func([]byte) ([]byte, error) {
		identity, _, err := recovery.GenerateIdentity(seal.Memory{})
		if err != nil {
			return nil, err
		}
		defer identity.Close()
		var b []byte
		identity.With(func(key []byte) { b = append(b, key...) })
		return b, nil
	}
	type answers = []func([]byte) ([]byte, error)
	for name, row := range map[string]struct {
		p    *person
		says string
		told int
	}{
		"at once":          {&person{answers: answers{right}}, "", 0},
		"at the last try":  {&person{answers: answers{wrong, other, right}}, "", 2},
		"too late":         {&person{answers: answers{wrong, wrong, other, right}}, "3 lines did not open the recovery slot", 3},
		"the input ends":   {&person{answers: answers{wrong}}, "the input ended", 1},
		"it must not stay": {&person{refuses: errors.New("standard output is a file")}, "standard output is a file", 0},
	} {
		n := nodetest.New(t)
		kek, err := n.Memory.NewKEK()
		if err != nil {
			t.Fatal(err)
		}
		slot, err := makeRecovery(t.Context(), n, kek, InitOptions{Prompter: row.p})
		if row.says == "" && (err != nil || slot.Type != seal.TypeRecovery) || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%s: %+v, %v", name, slot, err)
		}
		if len(row.p.told) != row.told {
			t.Errorf("%s: told %q", name, row.p.told)
		}
		kek.Close()
	}
}

// TestRecipients: with recipients nobody is asked; without a person there is no identity.
func TestRecipients(t *testing.T) {
	n := nodetest.New(t)
	kek, err := n.Memory.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	secret, recipient, err := recovery.GenerateIdentity(n.Memory)
	if err != nil {
		t.Fatal(err)
	}
	secret.Close()
	for name, row := range map[string]struct {
		recipients []string
		says       string
	}{
		"a recipient": {[]string{recipient}, ""},
		"a mistyped":  {[]string{recipient[:len(recipient)-1]}, "--recovery-recipient: "},
		"none":        {nil, "give --recovery-recipient"},
	} {
		_, err := makeRecovery(t.Context(), n, kek, InitOptions{Recipients: row.recipients})
		if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestVacant: init makes a keyring only where none exists or existed.
func TestVacant(t *testing.T) {
	file := func(name string) func(*testing.T, *node.Node) {
		return func(t *testing.T, n *node.Node) {
			if err := os.WriteFile(filepath.Join(n.Config.State.Dir, name), []byte("damaged"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	anchor := func(revision uint64) func(*testing.T, *node.Node) {
		return func(t *testing.T, n *node.Node) {
			if err := n.Anchor.Replace(t.Context(), keyring.Anchor{KeyID: seal.KeyID("k1-" + strings.Repeat("a", 52)), Revision: revision}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, row := range map[string]struct {
		put  func(*testing.T, *node.Node)
		says string
	}{
		"nothing":                 {func(*testing.T, *node.Node) {}, ""},
		"a killed init's anchor":  {anchor(1), ""},
		"a keyring":               {file("keyring.json"), "init never replaces a keyring"},
		"a lost keyring's anchor": {anchor(2), "kleidi keyring restore --previous"},
		"a damaged anchor":        {file("anchor.json"), "parse anchor"},
		"a previous revision":     {file("keyring.json.previous"), "kleidi keyring restore --previous"},
	} {
		n := nodetest.New(t)
		if err := os.Mkdir(n.Config.State.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		row.put(t, n)
		err := checkVacant(t.Context(), n)
		if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRefusedBeforeAnythingIsMade: options that contradict the configuration are refused,
// and leave nothing on the disk.
func TestRefusedBeforeAnythingIsMade(t *testing.T) {
	for name, row := range map[string]struct {
		order []string
		opts  InitOptions
		says  string
	}{
		"recovery beside two of two": {[]string{seal.TypeTPMAndVault}, InitOptions{}, "break two of two"},
		"a key without a token":      {nil, InitOptions{GenerateKey: true}, "--generate-key is for a token that is configured"},
		"a token beside two of two":  {[]string{seal.TypeTPMAndVault}, InitOptions{NoRecovery: true, Import: &Import{}}, "the token alone would open"},
	} {
		n := nodetest.New(t, func(c *config.Config) {
			if row.order != nil {
				c.Unlock.Order = row.order
			}
		})
		if _, err := Init(t.Context(), n, row.opts); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(n.Config.Keyring()); err == nil {
			t.Errorf("%s: there is a keyring", name)
		}
	}
}

// TestLegacyURI: a token of kleidi 1.x is found by the values in its config.json,
// whatever characters they contain.
func TestLegacyURI(t *testing.T) {
	number := uint(0)
	for want, c := range map[string]hsm.Config{
		"pkcs11:object=kek;token=kleidi":           {KeyLabel: "kek", TokenLabel: "kleidi"},
		"pkcs11:object=a%3Bb;token=c%20d;serial=1": {KeyLabel: "a;b", TokenLabel: "c d", TokenSerial: "1"},
		"pkcs11:object=kek;slot-id=0":              {KeyLabel: "kek", SlotID: &number},
	} {
		if got := legacyURI(c); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
