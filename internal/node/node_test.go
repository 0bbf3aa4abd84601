package node

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

func newNode(t *testing.T, amend ...func(*config.Config)) *Node {
	t.Helper()
	cfg := config.Default()
	cfg.Node, cfg.State.Dir = "cp-1", filepath.Join(t.TempDir(), "state")
	for _, f := range amend {
		f(cfg)
	}
	n, err := New(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

func withVault(c *config.Config) {
	c.Vault.Address, c.Vault.Key = "https://vault.example:8200", "kleidi"
	c.Vault.Auth.Method, c.Vault.Auth.TokenFile = "token", "/etc/kleidi/token"
}

func withPlugin(c *config.Config) { c.KMSPlugin.Socket = "/run/other/kms.sock" }

func order(kinds ...string) func(*config.Config) {
	return func(c *config.Config) { c.Unlock.Order = kinds }
}

func freely(c *config.Config) { c.Unlock.RequireAttestation = false }

// TestWrappers: which wrappers may open the keyring at start, and in which order; which
// make slots; and which need no attestation.
func TestWrappers(t *testing.T) {
	for name, row := range map[string]struct {
		amend                   []func(*config.Config)
		openers, wraps, ungated []string
		attests, twoOfTwo       bool
	}{
		"the TPM alone": {nil, []string{"tpm"}, []string{"tpm"}, nil, true, false},
		"a server after the TPM": {[]func(*config.Config){withVault, order("tpm", "vault")},
			[]string{"tpm", "vault"}, []string{"tpm", "vault", "tpm-and-vault"}, nil, true, false},
		"a server first, without attestation": {[]func(*config.Config){withVault, order("vault", "tpm"), freely},
			[]string{"vault", "tpm"}, []string{"tpm", "vault", "tpm-and-vault"}, []string{"vault"}, true, false},
		"a server configured, but not for the start": {[]func(*config.Config){withVault, freely},
			[]string{"tpm"}, []string{"tpm", "vault", "tpm-and-vault"}, []string{"vault"}, true, false},
		"no TPM": {[]func(*config.Config){withPlugin, order("kms-plugin"), freely},
			[]string{"kms-plugin"}, []string{"kms-plugin", "tpm-and-kms-plugin"}, []string{"kms-plugin"}, false, false},
		"no TPM, and it must attest": {[]func(*config.Config){withPlugin, order("kms-plugin")},
			[]string{"kms-plugin"}, []string{"kms-plugin", "tpm-and-kms-plugin"}, nil, true, false},
		"two of two": {[]func(*config.Config){withVault, order("tpm-and-vault"), freely},
			[]string{"tpm-and-vault"}, []string{"tpm", "vault", "tpm-and-vault"}, []string{"vault"}, true, true},
	} {
		n := newNode(t, row.amend...)
		if got := typesOf(n.Openers()); !slices.Equal(got, row.openers) {
			t.Errorf("%s: %q may open at start, want %q", name, got, row.openers)
		}
		if got := typesOf(n.Wrappers()); !slices.Equal(got, row.wraps) {
			t.Errorf("%s: %q wrap, want %q", name, got, row.wraps)
		}
		var ungated []string
		for _, w := range n.Wrappers() {
			if n.ungated(w.Type()) {
				ungated = append(ungated, w.Type())
			}
		}
		if !slices.Equal(ungated, row.ungated) {
			t.Errorf("%s: %q need no attestation, want %q", name, ungated, row.ungated)
		}
		if n.Attests() != row.attests || (n.View.TwoOfTwo() != "") != row.twoOfTwo {
			t.Errorf("%s: attests %v, two of two %q", name, n.Attests(), n.View.TwoOfTwo())
		}
		if n.Wrapper("pkcs11") != nil || n.Wrapper("tpm-and-pkcs11") != nil || n.Wrapper("usb") != nil {
			t.Errorf("%s: there is a wrapper that was not configured", name)
		}
	}
}

func typesOf(wrappers []seal.Wrapper) (types []string) {
	for _, w := range wrappers {
		types = append(types, w.Type())
	}
	return types
}

// TestNewNamesTheSetting: New refuses an unusable configuration, and names the wrong key.
func TestNewNamesTheSetting(t *testing.T) {
	for says, amend := range map[string]func(*config.Config){
		"tpm.device: ":     func(c *config.Config) { c.TPM.Device = "usb:1" },
		"tpm.epochIndex: ": func(c *config.Config) { c.TPM.EpochIndex = 1 },
		"anchor.index: ":   func(c *config.Config) { c.Anchor.Store, c.Anchor.Index = config.AnchorTPM, 1 },
	} {
		cfg := config.Default()
		cfg.Node, cfg.State.Dir = "cp-1", t.TempDir()
		amend(cfg)
		if _, err := New(cfg, slog.New(slog.DiscardHandler), nil); err == nil || !strings.HasPrefix(err.Error(), says) {
			t.Errorf("%q: %v", says, err)
		}
	}
}

// TestOneProcessHasTheStateFolder: reading the keyring takes the folder, and a second
// process is refused until the first ends. A file that is only read needs no lock.
func TestOneProcessHasTheStateFolder(t *testing.T) {
	ctx, dir := t.Context(), filepath.Join(t.TempDir(), "state")
	first, second := &StateFolder{dir: dir}, &StateFolder{dir: dir}
	path := filepath.Join(dir, "keyring.json")
	if _, _, err := first.File(path).Load(ctx); !errors.Is(err, fs.ErrNotExist) || first.Held() {
		t.Errorf("a serve without a keyring holds the folder that init needs: %v", err)
	}
	version, err := first.File(path).Save(ctx, []byte("one"), "")
	if err != nil || !first.Held() {
		t.Fatal(err)
	}
	if _, _, err := second.File(path).Load(ctx); seal.CauseOf(err) != seal.CauseStore || !errors.Is(err, store.ErrLocked) {
		t.Errorf("the second process reads: %v", err)
	}
	if _, err := second.File(path).Save(ctx, []byte("two"), version); !errors.Is(err, store.ErrLocked) {
		t.Errorf("the second process writes: %v", err)
	}
	if b, _, err := (readFreely{second.File(path)}).Load(ctx); err != nil || string(b) != "one" {
		t.Errorf("%q, %v", b, err)
	}
	first.Release()
	first.Release() // harmless
	if b, _, err := second.File(path).Load(ctx); err != nil || string(b) != "one" || !second.Held() {
		t.Errorf("%q, %v", b, err)
	}
	second.Release()
}

// TestStateFolderOfOthers: a keyring in a folder that every user may write to is not
// read.
func TestStateFolderOfOthers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := &StateFolder{dir: dir}
	path := filepath.Join(dir, "keyring.json")
	if _, err := s.File(path).Save(t.Context(), []byte("one"), ""); err != nil {
		t.Fatal(err)
	}
	defer s.Release()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.File(path).Load(t.Context()); err == nil || !strings.Contains(err.Error(), dir+" may be written by others") {
		t.Errorf("%v", err)
	}
}

// wrapper opens every slot with a given outcome.
type wrapper struct {
	kek *seal.Secret
	err error
}

func (wrapper) Type() string { return seal.TypeVault }

func (wrapper) Wrap(context.Context, *seal.Secret) (seal.Slot, error) {
	return seal.Slot{}, errors.New("wraps nothing")
}

func (w wrapper) Unwrap(context.Context, seal.Slot) (*seal.Secret, error) {
	if w.err != nil {
		return nil, w.err
	}
	var c *seal.Secret
	var err error
	w.kek.With(func(b []byte) { c, err = seal.Memory{}.Take(slices.Clone(b)) })
	return c, err
}

// TestAnotherKey: before a slot is made again, the wrapper proves that it has the slot's
// key. Only a failed proof asks the operator; an unreachable server does not.
func TestAnotherKey(t *testing.T) {
	newKEK := func() *seal.Secret {
		kek, err := seal.Memory{}.NewKEK()
		if err != nil {
			t.Fatal(err)
		}
		return kek
	}
	ours, theirs := newKEK(), newKEK()
	defer theirs.Close()
	slot := seal.Slot{Type: seal.TypeVault, Data: []byte("{}")}
	k, err := keyring.New(seal.ClusterID{1}, ours, []seal.Slot{slot}, []keyring.Node{{Name: "cp-1"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	n := newNode(t, withVault)
	away := seal.Errorf(seal.CauseUnavailable, "start it", "the server is away")
	for name, row := range map[string]struct {
		w     wrapper
		cause seal.Cause
		asks  bool
	}{
		"the same key":                {wrapper{kek: k.KEK()}, "", false},
		"another KEK":                 {wrapper{kek: theirs}, seal.CauseSlotCorrupt, true},
		"a key that does not open it": {wrapper{err: seal.ErrNotMine}, seal.CauseNoSlot, true},
		"away":                        {wrapper{err: away}, seal.CauseUnavailable, false},
	} {
		err := n.CheckKeyOf(t.Context(), k, row.w)
		other, asks := errors.AsType[*OtherKeyError](err)
		if (err == nil) != (row.cause == "") || err != nil && seal.CauseOf(err) != row.cause || asks != row.asks {
			t.Errorf("%s: %v", name, err)
		}
		if asks && !strings.Contains(other.Error(), "kleidi slot rewrap vault --new-key") {
			t.Errorf("%s: the remedy is missing: %v", name, err)
		}
		rewrapper := provenRewrapper{rewrapping{row.w}, n, k}
		if _, err := rewrapper.WrapLike(t.Context(), theirs, slot); (err == nil) != (row.cause == "") {
			t.Errorf("%s: WrapLike: %v", name, err)
		}
	}
}

// rewrapping makes a slot again for any caller.
type rewrapping struct{ wrapper }

func (rewrapping) WrapLike(_ context.Context, _ *seal.Secret, like seal.Slot) (seal.Slot, error) {
	return like, nil
}

// TestAdvise: without a recovery slot, no refusal sends the operator to look for a recovery
// identity.
func TestAdvise(t *testing.T) {
	refusal := seal.Errorf(seal.CauseSlotCorrupt, "run kleidi slot rewrap NAME", "damaged").OrRecover()
	for name, row := range map[string]struct {
		slots    []seal.Slot
		recovers bool
	}{
		"no keyring":        {nil, true},
		"a recovery slot":   {[]seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}}, true},
		"without such slot": {[]seal.Slot{{Type: seal.TypeVault, Data: []byte("{}")}}, false},
	} {
		n := newNode(t, withVault, order("vault"), freely)
		if row.slots != nil {
			kek, err := seal.Memory{}.NewKEK()
			if err != nil {
				t.Fatal(err)
			}
			k, err := keyring.New(seal.ClusterID{1}, kek, row.slots, []keyring.Node{{Name: "cp-1"}}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			if err := n.Unlocker.Adopt(t.Context(), "", unlock.Opener{}, k, []*keyring.Keyring{k}); err != nil {
				t.Fatal(err)
			}
		}
		if got := n.Advise(t.Context(), refusal); strings.Contains(got.Error(), "kleidi recover") != row.recovers {
			t.Errorf("%s: %v", name, got)
		}
	}
	if newNode(t).Advise(t.Context(), nil) != nil {
		t.Error("advice without an error")
	}
}

// TestTryOpen: opening a slot proves its key ID, or returns the problem.
func TestTryOpen(t *testing.T) {
	n := newNode(t, withVault)
	for name, row := range map[string]struct {
		slot  seal.Slot
		cause seal.Cause
	}{
		"no wrapper": {seal.Slot{Type: seal.TypePKCS11, Data: []byte("{}")}, seal.CauseNoSlot},
		"recovery":   {seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}, seal.CauseNoSlot},
		"other node": {seal.Slot{Type: seal.TypeTPM, Node: "cp-2", Data: []byte("{}")}, seal.CauseNoSlot},
	} {
		if err := n.TryOpen(t.Context(), row.slot, "k1-x", seal.ClusterID{1}); seal.CauseOf(err) != row.cause {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTPMOpenTo: only the path of a device is judged, and only if a TPM is used.
func TestTPMOpenTo(t *testing.T) {
	device := filepath.Join(t.TempDir(), "tpm")
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	at := func(address string) func(*config.Config) { return func(c *config.Config) { c.TPM.Device = address } }
	if who := newNode(t, at(device)).TPMOpenTo(); who != "" {
		t.Errorf("a device of this user is open to %s", who)
	}
	if err := os.Chmod(device, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{device, "unix:" + device} {
		if newNode(t, at(address)).TPMOpenTo() == "" {
			t.Errorf("%s: everybody may use it, and nobody says so", address)
		}
	}
	for name, n := range map[string]*Node{
		"over TCP":   newNode(t, at("tcp:127.0.0.1:2321")),
		"none there": newNode(t, at(device+"2")),
		"unused":     newNode(t, at(device), withVault, order("vault"), freely),
	} {
		if who := n.TPMOpenTo(); who != "" {
			t.Errorf("%s: open to %s", name, who)
		}
	}
}

// TestDemand: without a verifier nothing is demanded. With a verifier, only the operator's
// word skips it, and an unreadable public key is a refusal.
func TestDemand(t *testing.T) {
	var none *RemoteGate
	for _, without := range []bool{false, true} {
		if v, err := none.DemandUnless(without, seal.ClusterID{1}); v != nil || err != nil {
			t.Errorf("no verifier, without %v: %v, %v", without, v, err)
		}
	}
	g := &RemoteGate{}
	if v, err := g.DemandUnless(true, seal.ClusterID{1}); v != nil || err != nil {
		t.Errorf("the operator goes on without it: %v, %v", v, err)
	}
	if v, err := g.DemandUnless(false, seal.ClusterID{1}); v != nil || err == nil || !strings.Contains(err.Error(), "tpm.verifier.publicKey") {
		t.Errorf("no public key: %v, %v", v, err)
	}
}
