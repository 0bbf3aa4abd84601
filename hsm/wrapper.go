package hsm

import (
	"context"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// Errors whose remedy differs from that of their cause.
var (
	// ErrNoKey says that the token has no such key: it was deleted, or never made. The
	// cause is [seal.CauseKeyMissing].
	ErrNoKey = errors.New("it has no key that matches")
	// ErrNotPermitted says that no mechanism of kleidi is both offered by the token and
	// allowed by the key. The cause is [seal.CauseUnavailable].
	ErrNotPermitted = errors.New("no mechanism is both offered by the token and allowed by the key")
)

// Wrapper wraps KEKs with a key on a PKCS#11 token. It implements [seal.Wrapper].
type Wrapper struct {
	config   Config
	target   *target
	only     []string // mechanisms to choose from; empty means all
	moduleAt func(path string) *module
}

// Key describes a key on a token.
type Key struct {
	// TokenLabel and TokenSerial name the token.
	TokenLabel, TokenSerial string
	// Label is CKA_LABEL, ID is CKA_ID.
	Label string
	ID    []byte
	// Mechanism names the mechanism by which the key wraps, as keyslots do.
	Mechanism string
	// Extractable says that the token can give the key away, in plain or wrapped.
	Extractable bool
}

// Available says whether this build can load modules. If it can't, [New] fails with
// [ErrNoCgo].
const Available = haveCgo

// New returns a Wrapper. It uses neither the module nor the token nor the PIN: if the
// token is away, the operation that needs it fails. The error is [ErrNoCgo] if kleidi was
// built without cgo.
func New(c Config) (*Wrapper, error) {
	if !haveCgo {
		return nil, ErrNoCgo
	}
	t, err := c.resolve()
	if err != nil {
		return nil, err
	}
	return &Wrapper{config: c, target: t, moduleAt: moduleAt}, nil
}

// ErrNoCgo says that kleidi was built without PKCS#11, and how to get a build with it.
var ErrNoCgo = errors.New("this kleidi was built without PKCS#11; install the build of make build-pkcs11, or use the image with PKCS#11; see docs/pkcs11.md")

// Type implements [seal.Wrapper].
func (w *Wrapper) Type() string { return seal.TypePKCS11 }

// Wrap implements [seal.Wrapper].
func (w *Wrapper) Wrap(ctx context.Context, kek *seal.Secret) (seal.Slot, error) {
	return w.wrap(ctx, kek, nil)
}

// WrapLike wraps kek as Wrap does. The error is [seal.ErrNotMine] unless this wrapper's
// key made the slot like.
func (w *Wrapper) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	d, err := w.parse(like)
	if err != nil {
		return seal.Slot{}, err
	}
	return w.wrap(ctx, kek, d)
}

func (w *Wrapper) wrap(ctx context.Context, kek *seal.Secret, like *keyslot.Data) (seal.Slot, error) {
	copied, err := w.copyOf(kek)
	if err != nil {
		return seal.Slot{}, err
	}
	d, err := w.seal(ctx, copied, like)
	if err != nil {
		return seal.Slot{}, w.withName("wrap", err)
	}
	return d.Slot()
}

// copyOf returns a copy of kek. A call into a module can outlast ctx; without a copy, the
// caller could not close its Secret before the call ends.
func (w *Wrapper) copyOf(kek *seal.Secret) (*seal.Secret, error) {
	copied, err := w.config.Memory.New(seal.KEKSize)
	if err != nil {
		return nil, err
	}
	err = errors.New("wrap with PKCS#11: no KEK to wrap: it is closed or has the wrong size")
	kek.With(func(b []byte) {
		if len(b) == seal.KEKSize {
			copied.With(func(c []byte) { copy(c, b) })
			err = nil
		}
	})
	if err != nil {
		_ = copied.Close()
		return nil, err
	}
	return copied, nil
}

// Unwrap implements [seal.Wrapper].
func (w *Wrapper) Unwrap(ctx context.Context, slot seal.Slot) (*seal.Secret, error) {
	d, err := w.parse(slot)
	if err != nil {
		return nil, err
	}
	kek, err := w.open(ctx, d)
	if err != nil {
		return nil, w.withName("unwrap", err)
	}
	return kek, nil
}

// parse parses a slot that may be this wrapper's.
func (w *Wrapper) parse(slot seal.Slot) (*keyslot.Data, error) {
	d, err := keyslot.Parse(slot)
	if err == nil && !w.target.key.mayMatch(d.Key) {
		return nil, seal.ErrNotMine
	}
	return d, err
}

// withName prefixes an error with the wrapper's name. If err has a [*seal.Error], so has
// the result, as its outermost error.
func (w *Wrapper) withName(operation string, err error) error {
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
	return &seal.Error{Cause: seal.CauseUnavailable, Err: fmt.Errorf("%s: %s: %w", name, operation, err),
		Hint: "check whether the token works (pkcs11-tool --module … --test), and docs/pkcs11.md; kleidi tries again by itself"}
}

// GenerateKey makes the configured key: an AES-256 key that is private, sensitive and not
// extractable. It fails if such a key exists already. The ID of the key is random if
// none is configured.
func (w *Wrapper) GenerateKey(ctx context.Context) (Key, error) {
	k, err := w.generate(ctx)
	if err != nil {
		return Key{}, w.withName("generate a key", err)
	}
	return k, nil
}

// Find logs in and returns the configured key.
func (w *Wrapper) Find(ctx context.Context) (Key, error) {
	k, err := w.findKey(ctx)
	if err != nil {
		return Key{}, w.withName("find the key", err)
	}
	return k, nil
}
