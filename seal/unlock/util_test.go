package unlock_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

var (
	ctx = context.Background()
	now = time.Unix(1_790_000_000, 0)
)

// steps records the steps of an attempt or a change, in order.
type steps struct {
	mu   sync.Mutex
	list []string
}

func (s *steps) add(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, fmt.Sprintf(format, args...))
}

// take returns the steps since the last call of take.
func (s *steps) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() { s.list = nil }()
	return s.list
}

// fault makes a store, anchor, gate or wrapper fail while err is set.
type fault struct {
	mu  sync.Mutex
	err error
}

func (f *fault) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fault) get() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// faultyStore is a real store whose loads and saves can fail.
type faultyStore struct {
	*store.File
	loads, saves fault
	// after is how many saves succeed before saves takes effect.
	after int
	saved func() // if set, called after each save
	steps *steps
}

func (s *faultyStore) Load(ctx context.Context) ([]byte, store.Version, error) {
	if err := s.loads.get(); err != nil {
		return nil, "", err
	}
	return s.File.Load(ctx)
}

func (s *faultyStore) Save(ctx context.Context, b []byte, old store.Version) (store.Version, error) {
	if err := s.saves.get(); err != nil {
		if s.after == 0 {
			return "", err
		}
		s.after--
	}
	s.steps.add("save")
	if s.saved != nil {
		defer s.saved()
	}
	return s.File.Save(ctx, b, old)
}

// faultyAnchor is a real anchor whose saves can fail.
type faultyAnchor struct {
	unlock.FileAnchor
	saves fault
	steps *steps
}

func (p *faultyAnchor) Save(ctx context.Context, anchor keyring.Anchor) error {
	if err := p.saves.get(); err != nil {
		return err
	}
	p.steps.add("anchor %d", anchor.Revision)
	return p.FileAnchor.Save(ctx, anchor)
}

func (p *faultyAnchor) Replace(ctx context.Context, anchor keyring.Anchor) error {
	return p.Save(ctx, anchor)
}

// gate is a Gate that can be shut.
type gate struct {
	fault
	steps *steps
}

func (g *gate) Attest(context.Context, []seal.Slot) error {
	g.steps.add("gate")
	return g.get()
}

func (g *gate) Explain(err error) error { return fmt.Errorf("explained: %w", err) }

// openWrapper is a wrapper whose slots hold the KEK in plain, so that tests can make and
// damage them.
type openWrapper struct {
	fault
	name  string
	steps *steps
	// verdicts holds the error of Unwrap by the text of the slot.
	verdicts map[string]error
}

type openSlot struct {
	KEK  []byte `json:"kek"`
	Text string `json:"text,omitempty"`
}

func (w *openWrapper) Type() string { return w.name }

func (w *openWrapper) Wrap(_ context.Context, kek *seal.Secret) (seal.Slot, error) {
	return w.slot(kek, ""), w.get()
}

func (w *openWrapper) slot(kek *seal.Secret, text string) (s seal.Slot) {
	kek.With(func(b []byte) {
		data, err := json.Marshal(openSlot{bytes.Clone(b), text})
		if err != nil {
			panic(err)
		}
		s = seal.Slot{Type: w.name, Data: data}
	})
	return s
}

func (w *openWrapper) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if like.Type != w.name {
		return seal.Slot{}, seal.ErrNotMine
	}
	return w.Wrap(ctx, kek)
}

func (w *openWrapper) Unwrap(_ context.Context, s seal.Slot) (*seal.Secret, error) {
	if s.Type != w.name {
		return nil, seal.ErrNotMine
	}
	var d openSlot
	if err := json.Unmarshal(s.Data, &d); err != nil {
		return nil, err
	}
	w.steps.add("slot %s%s", w.name, d.Text)
	if err := errors.Join(w.get(), w.verdicts[d.Text]); err != nil {
		return nil, err
	}
	return seal.Memory{}.Take(d.KEK)
}

// node is a node with one wrapper and a real store.
type node struct {
	t       testing.TB
	dir     string
	steps   steps
	store   *faultyStore
	anchor  *faultyAnchor
	gate    *gate
	wrapper *openWrapper
	settle  fault
	cfg     unlock.Config
	*unlock.Unlocker
}

// newNode returns a locked node without a keyring.
func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{t: t, dir: filepath.Join(t.TempDir(), "state")}
	if err := store.PrepareDir(n.dir); err != nil {
		t.Fatal(err)
	}
	n.store = &faultyStore{File: store.NewFile(filepath.Join(n.dir, "keyring.json")), steps: &n.steps}
	n.anchor = &faultyAnchor{FileAnchor: unlock.FileAnchor{Store: store.NewFile(filepath.Join(n.dir, "anchor.json"))}, steps: &n.steps}
	n.gate = &gate{steps: &n.steps}
	n.wrapper = &openWrapper{name: "tpm", steps: &n.steps, verdicts: map[string]error{}}
	n.cfg = unlock.Config{Store: n.store, Anchor: n.anchor, Gate: n.gate, Wrappers: []seal.Wrapper{n.wrapper}, Settle: n.settled, Log: slog.New(slog.DiscardHandler)}
	n.restart()
	return n
}

// settled records the key ID that is announced when Settle is called.
func (n *node) settled(context.Context, []seal.Slot) error {
	id, err := n.CurrentID()
	if err != nil {
		id = "nothing"
	}
	n.steps.add("settle while %.8s is announced", id)
	return n.settle.get()
}

// restart replaces the Unlocker, as a new process would.
func (n *node) restart() {
	if n.Unlocker != nil {
		n.Unlocker.Close()
	}
	n.Unlocker = unlock.New(n.cfg)
	n.t.Cleanup(n.Unlocker.Close)
}

// make stores a new keyring, as init does.
func (n *node) make() *keyring.Keyring {
	n.t.Helper()
	return n.makeWith(n.wrapper)
}

// makeWith stores a new keyring with a slot of each of these wrappers.
func (n *node) makeWith(wrappers ...*openWrapper) *keyring.Keyring {
	n.t.Helper()
	k := n.newKeyring(wrappers...)
	n.put(k.Marshal())
	if err := n.anchor.Save(ctx, k.Anchor()); err != nil {
		n.t.Fatal(err)
	}
	n.steps.take()
	return k
}

// newKeyring returns a new keyring without storing it.
func (n *node) newKeyring(wrappers ...*openWrapper) *keyring.Keyring {
	n.t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		n.t.Fatal(err)
	}
	var slots []seal.Slot
	for _, w := range wrappers {
		slots = append(slots, w.slot(kek, ""))
	}
	k, err := keyring.New(seal.ClusterID{1}, kek, slots, nil, now)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(k.Close)
	return k
}

// fallback configures a second wrapper and returns it.
func (n *node) fallback() *openWrapper {
	w := &openWrapper{name: "vault", steps: &n.steps}
	n.cfg.Wrappers = []seal.Wrapper{n.wrapper, w}
	n.restart()
	return w
}

// opened returns a node whose keyring is open.
func opened(t testing.TB) *node {
	t.Helper()
	n := newNode(t)
	n.make()
	n.mustOpen()
	return n
}

func (n *node) mustOpen() {
	n.t.Helper()
	if err := n.Unlock(ctx); err != nil {
		n.t.Fatal(err)
	}
	n.steps.take()
}

// put overwrites the stored keyring, as somebody else would.
func (n *node) put(b []byte) {
	n.t.Helper()
	if err := os.WriteFile(n.store.Path(), b, 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) read(name string) []byte {
	n.t.Helper()
	b, err := os.ReadFile(filepath.Join(n.dir, name))
	if err != nil {
		n.t.Fatal(err)
	}
	return b
}

// rotate rotates the KEK, as kleidi rotate does.
func (n *node) rotate() error {
	return n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		return rotation.Rotate(ctx, seal.Memory{}, k, rotation.Like([]rotation.Rewrapper{n.wrapper}, k.Slots()), []seal.Wrapper{n.wrapper}, now)
	})
}

// encrypted is an encrypted DEK seed.
type encrypted struct {
	id         seal.KeyID
	ciphertext []byte
}

func (n *node) encrypt() encrypted {
	n.t.Helper()
	c, id, err := n.Encrypt([]byte("a DEK seed"))
	if err != nil {
		n.t.Fatal(err)
	}
	return encrypted{id, c}
}

func (n *node) decrypts(e encrypted) {
	n.t.Helper()
	if b, err := n.Decrypt(e.id, e.ciphertext); err != nil || string(b) != "a DEK seed" {
		n.t.Errorf("decrypted %q, %v", b, err)
	}
}

// wantRefusal wants err to have the cause and a hint, and to contain each text of says.
func wantRefusal(t testing.TB, err error, cause seal.Cause, says ...string) {
	t.Helper()
	e, ok := errors.AsType[*seal.Error](err)
	if !ok || e.Cause != cause || e.Hint == "" {
		t.Errorf("%v (cause %q); want cause %q and a hint", err, seal.CauseOf(err), cause)
		return
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
}

func wantSteps(t testing.TB, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("steps %q, want %q", got, want)
	}
}

// edited replaces old in the body of a keyring, and keeps its MAC.
func edited(t testing.TB, file []byte, old, with string) []byte {
	t.Helper()
	var e struct {
		Body []byte `json:"body"`
		MAC  []byte `json:"mac"`
	}
	if err := json.Unmarshal(file, &e); err != nil {
		t.Fatal(err)
	}
	body := bytes.Replace(e.Body, []byte(old), []byte(with), 1)
	if bytes.Equal(body, e.Body) {
		t.Fatalf("%q is not in the keyring", old)
	}
	return fmt.Appendf(nil, `{"body":%q,"mac":%q}`+"\n", base64.StdEncoding.EncodeToString(body), base64.StdEncoding.EncodeToString(e.MAC))
}
