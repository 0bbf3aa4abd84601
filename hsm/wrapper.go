package hsm

import (
	"context"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
)

// What calls for other remedies than most of [seal.CauseUnavailable].
var (
	// ErrNoKey: the token is there and the key is not. It was deleted, or never made.
	// The cause is [seal.CauseKeyMissing].
	ErrNoKey = errors.New("it has no key that matches")
	// ErrNotPermitted: no mechanism of kleidi's is both offered by the token and
	// allowed by the key.
	ErrNotPermitted = errors.New("no mechanism is both offered by the token and allowed by the key")
)

// Wrapper wraps KEKs with a key in a PKCS#11 token. It implements [seal.Wrapper].
type Wrapper struct {
	config Config
	target *target
	only   []string // mechanisms to choose from; empty means all
	find   func(path string) *module
}

// Key names a key of a token.
type Key struct {
	// TokenLabel and TokenSerial name the token.
	TokenLabel, TokenSerial string
	// Label is CKA_LABEL, ID is CKA_ID.
	Label string
	ID    []byte
	// Mechanism is how it wraps, as slots name it.
	Mechanism string
	// Extractable says that the token would hand the key out, in the clear or wrapped.
	Extractable bool
}

// Available says whether this build can load modules. Without, [New] is [ErrNoCgo].
const Available = haveCgo

// New returns a wrapper. It reads neither the module nor the token nor the PIN, so
// that a token that is away is an error of the operation that wants it. Where kleidi
// was built without cgo, the error is [ErrNoCgo].
func New(c Config) (*Wrapper, error) {
	if !haveCgo {
		return nil, ErrNoCgo
	}
	t, err := c.resolve()
	if err != nil {
		return nil, err
	}
	return &Wrapper{config: c, target: t, find: moduleAt}, nil
}

// ErrNoCgo says how to get a kleidi with PKCS#11.
var ErrNoCgo = errors.New("this kleidi was built without PKCS#11; install the one of make build-pkcs11, or use the image with PKCS#11; see docs/pkcs11.md")

// Type implements [seal.Wrapper].
func (w *Wrapper) Type() string { return seal.TypePKCS11 }

// Wrap implements [seal.Wrapper].
func (w *Wrapper) Wrap(ctx context.Context, kek *seal.Secret) (seal.Slot, error) {
	return w.wrap(ctx, kek, nil)
}

// WrapLike wraps kek as Wrap does, if like is a slot of this wrapper's key. It is
// [seal.ErrNotMine] for all others.
func (w *Wrapper) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	d, err := w.parse(like)
	if err != nil {
		return seal.Slot{}, err
	}
	return w.wrap(ctx, kek, d)
}

func (w *Wrapper) wrap(ctx context.Context, kek *seal.Secret, like *slotData) (seal.Slot, error) {
	own, err := w.copyOf(kek)
	if err != nil {
		return seal.Slot{}, err
	}
	d, err := w.seal(ctx, own, like)
	if err != nil {
		return seal.Slot{}, w.named("wrap", err)
	}
	return d.slot()
}

// copyOf returns a KEK of our own: a call into a module can outlast ctx, and who
// closes the caller's Secret would wait for it.
func (w *Wrapper) copyOf(kek *seal.Secret) (*seal.Secret, error) {
	own, err := w.config.Memory.New(seal.KEKSize)
	if err != nil {
		return nil, err
	}
	err = errors.New("wrap with PKCS#11: no KEK to wrap: it is closed or of another size")
	kek.With(func(b []byte) {
		if len(b) == seal.KEKSize {
			own.With(func(c []byte) { copy(c, b) })
			err = nil
		}
	})
	if err != nil {
		_ = own.Close()
		return nil, err
	}
	return own, nil
}

// Unwrap implements [seal.Wrapper].
func (w *Wrapper) Unwrap(ctx context.Context, slot seal.Slot) (*seal.Secret, error) {
	d, err := w.parse(slot)
	if err != nil {
		return nil, err
	}
	kek, err := w.open(ctx, d)
	if err != nil {
		return nil, w.named("unwrap", err)
	}
	return kek, nil
}

// parse reads a slot that may be this wrapper's.
func (w *Wrapper) parse(slot seal.Slot) (*slotData, error) {
	d, err := parseSlot(slot)
	if err == nil && !w.target.key.mayBe(d.Key) {
		return nil, seal.ErrNotMine
	}
	return d, err
}

// named prefixes an error with the wrapper's name; a *seal.Error keeps its place as
// the outermost one.
func (w *Wrapper) named(what string, err error) error {
	if errors.Is(err, seal.ErrNotMine) {
		return seal.ErrNotMine
	}
	name := w.config.Name
	if name == "" {
		name = seal.TypePKCS11
	}
	if e, ok := errors.AsType[*seal.Error](err); ok {
		return &seal.Error{Cause: e.Cause, Hint: e.Hint, Err: fmt.Errorf("%s: %w", name, e.Err)}
	}
	return &seal.Error{Cause: seal.CauseUnavailable, Err: fmt.Errorf("%s: %s: %w", name, what, err),
		Hint: "see whether the token is well (pkcs11-tool --module … --test), and docs/pkcs11.md; kleidi tries again by itself"}
}

// GenerateKey makes the key that the configuration names: AES-256, sensitive, not
// extractable, private. It refuses where there is such a key already. The key's ID
// is random where none is configured.
func (w *Wrapper) GenerateKey(ctx context.Context) (Key, error) {
	k, err := w.generate(ctx)
	if err != nil {
		return Key{}, w.named("generate a key", err)
	}
	return k, nil
}

// Find logs in and returns the key that wraps, and how it would.
func (w *Wrapper) Find(ctx context.Context) (Key, error) {
	k, err := w.look(ctx)
	if err != nil {
		return Key{}, w.named("find the key", err)
	}
	return k, nil
}
