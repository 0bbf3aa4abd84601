package unlock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

// Store keeps bytes by compare-and-swap, see package store.
type Store interface {
	Load(context.Context) ([]byte, store.Version, error)
	Save(ctx context.Context, b []byte, old store.Version) (store.Version, error)
}

// Gate is what has to pass before a slot is opened.
type Gate interface {
	// Attest verifies fresh evidence of how this machine booted.
	Attest(ctx context.Context, slots []seal.Slot) error
	// Explain adds what changed to a refusal.
	Explain(error) error
}

// Overruled is a refusal of the gate that leaves some slots to be tried: those of
// a suspension, which the TPM limits.
type Overruled interface {
	error
	Overrules(seal.Slot) bool
}

// Config is what an Unlocker works with.
type Config struct {
	Store  Store
	Anchor Anchor
	// Ready, if set, has to pass before a KEK is opened, whatever the gate says.
	Ready func() error
	// Gate may be nil where there is no TPM.
	Gate Gate
	// Ungated reports whether a wrapper of that type may open slots although the gate
	// refuses; nil is none.
	Ungated func(kind string) bool
	// Wrappers may open slots, in this order.
	Wrappers []seal.Wrapper
	// Settle, if set, ends the epochs before that of these slots. It is called
	// after every save and every opening.
	Settle func(context.Context, []seal.Slot) error
	Log    *slog.Logger
	// Attempted, if set, is told of each attempt: the cause of its failure, or "".
	Attempted func(seal.Cause, Timing)
}

// Timing is how long the steps of an attempt took.
type Timing struct {
	Load, Gate, Slots, Total time.Duration
}

// HintMissing is what to do where there is no keyring; init refuses where there was
// one.
const HintMissing = "run kleidi init if there never was one, else kleidi keyring restore with --previous or a backup"

// Unlocker is one node's keyring. Its methods may be called concurrently.
type Unlocker struct {
	cfg   Config
	open  atomic.Pointer[keyring.Keyring]
	state atomic.Pointer[State]

	mu      sync.Mutex // one attempt or change at a time
	version store.Version
	// unsettled says that the keyring is open, and nothing is to be done but to end
	// the epochs that are over.
	unsettled bool
	nudge     chan struct{}
	tried     chan struct{} // closed after the first attempt
	once      sync.Once
}

// State is where the state machine is, for people.
type State struct {
	Open bool `json:"open"`
	// Since is when it last went from locked to open, or the process started.
	Since time.Time `json:"since"`
	// Wrapper opened the keyring.
	Wrapper string `json:"wrapper,omitempty"`
	// Fallback is why the wrappers before it in the order did not; nil where it is
	// the first.
	Fallback error `json:"-"`
	// Staged is why the staged KEK is not open, where one is staged and only that failed.
	// Other nodes must not activate it then.
	Staged error `json:"-"`
	// Problem is why it is locked, or, where it is open, what failed last.
	Problem error `json:"-"`
	// Attempts counts attempts since it was last open.
	Attempts int       `json:"attempts"`
	Next     time.Time `json:"next,omitzero"`
	Timing   Timing    `json:"timing"`
}

// New returns a locked Unlocker.
func New(cfg Config) *Unlocker {
	u := &Unlocker{cfg: cfg, nudge: make(chan struct{}, 1), tried: make(chan struct{})}
	u.state.Store(&State{Since: time.Now(), Problem: seal.Errorf(seal.CauseStarting, "wait a moment", "the first attempt to unlock has not ended")})
	return u
}

// Tried is closed when the first attempt has ended, in whichever way.
func (u *Unlocker) Tried() <-chan struct{} { return u.tried }

// State returns the present state.
func (u *Unlocker) State() State { return *u.state.Load() }

// Keyring returns the open keyring, or why it is locked.
func (u *Unlocker) Keyring() (*keyring.Keyring, error) {
	if k := u.open.Load(); k != nil {
		return k, nil
	}
	return nil, u.state.Load().Problem
}

// CurrentID returns the current key ID.
func (u *Unlocker) CurrentID() (seal.KeyID, error) {
	k, err := u.Keyring()
	if err != nil {
		return "", err
	}
	return k.CurrentID(), nil
}

// Encrypt encrypts a DEK seed under the current KEK and returns that KEK's ID.
func (u *Unlocker) Encrypt(plaintext []byte) ([]byte, seal.KeyID, error) {
	k, err := u.Keyring()
	if err != nil {
		return nil, "", err
	}
	return k.Encrypt(plaintext)
}

// Decrypt decrypts a DEK seed under the named KEK.
func (u *Unlocker) Decrypt(id seal.KeyID, ciphertext []byte) ([]byte, error) {
	for {
		k, err := u.Keyring()
		if err != nil {
			return nil, err
		}
		plaintext, err := k.Decrypt(id, ciphertext)
		if errors.Is(err, keyring.ErrClosed) && u.open.Load() != k {
			continue // a reload overtook this call
		}
		return plaintext, err
	}
}

// Unlock makes one attempt: load, gate, slots in order, anchor, settle, announce. It
// does the same when open, so it is a reload too.
func (u *Unlocker) Unlock(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	defer u.once.Do(func() { close(u.tried) })
	u.unsettled = false
	var timing Timing
	start := time.Now()
	k, version, by, err := u.attempt(ctx, &timing)
	if err != nil && ctx.Err() != nil {
		return err // it was told to stop, which is nothing to report
	}
	if err != nil {
		err = u.whileOpen(ctx, err)
	} else if err = u.follows(k); err == nil {
		err = u.anchor(ctx, k)
	}
	var unsettled error
	switch {
	case err == nil:
		unsettled = u.settle(ctx, k)
	case k != nil:
		k.Close()
	}
	timing.Total = time.Since(start)
	if u.cfg.Attempted != nil {
		u.cfg.Attempted(seal.CauseOf(errors.Join(err, unsettled)), timing)
	}
	if err != nil {
		u.failed(err, timing)
		return err
	}
	u.version = version
	u.announce(k, by, timing)
	if u.unsettled = unsettled != nil; u.unsettled {
		u.failed(unsettled, timing)
	}
	return unsettled
}

// retry makes another attempt at what has failed. Where only an epoch could not be
// ended, no slot is opened once more for that: it may be a token's.
func (u *Unlocker) retry(ctx context.Context) error {
	u.mu.Lock()
	k := u.open.Load()
	if k == nil || !u.unsettled {
		u.mu.Unlock()
		return u.Unlock(ctx)
	}
	defer u.mu.Unlock()
	s := u.State()
	if err := u.settle(ctx, k); err != nil {
		u.failed(err, s.Timing)
		return err
	}
	u.unsettled = false
	s.Problem, s.Attempts, s.Next = nil, 0, time.Time{}
	u.state.Store(&s)
	u.cfg.Log.Info("the earlier epoch is ended: revoked slots no longer open")
	return nil
}

// Open opens the stored keyring as Unlock does, for the caller alone, who closes
// it. Nothing is saved, anchored or announced.
func (u *Unlocker) Open(ctx context.Context) (*keyring.Keyring, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, _, _, err := u.attempt(ctx, &Timing{})
	return k, err
}

// OpenUnanchored opens another keyring than the stored one through the gate and with
// a slot, for the caller alone, who closes it. The anchor is not asked: the caller
// finds out whether the keyring is to be trusted.
func (u *Unlocker) OpenUnanchored(ctx context.Context, untrusted *keyring.Untrusted) (*keyring.Keyring, Opener, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.openWith(ctx, untrusted, nil, &Timing{})
}

// Changed reports whether a reload would bring news: the stored keyring is
// another than the one last read or saved here, it can't be read, or the last
// attempt has failed.
func (u *Unlocker) Changed(ctx context.Context) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	_, version, err := u.cfg.Store.Load(ctx)
	return err != nil || version != u.version || u.State().Problem != nil
}

// follows refuses to go back, while a keyring is open, to one without its current
// KEK or of an older revision: whoever could put both an older keyring and an older
// anchor in place can't make this process forget what it announced.
func (u *Unlocker) follows(k *keyring.Keyring) error {
	open := u.open.Load()
	if open == nil || k.ClusterID() == open.ClusterID() && k.Holds(open.CurrentID()) && k.Revision() >= open.Revision() {
		return nil
	}
	return seal.Errorf(seal.CauseAnchor, "if the open one is the right one, "+hintSave,
		"the stored keyring is of revision %d and does not follow the open one of revision %d with key ID %s", k.Revision(), open.Revision(), open.CurrentID())
}

// anchor anchors k, also where the anchor is there already: the flush of the folder, which
// holds the keyring too, may have failed after either was saved. Where the anchor
// can't be saved, k is not announced: what was announced must not be rolled back.
func (u *Unlocker) anchor(ctx context.Context, k *keyring.Keyring) error {
	anchor, err := u.cfg.Anchor.Load(ctx)
	if err != nil {
		return err
	}
	err = u.cfg.Anchor.Save(ctx, k.Anchor())
	if anchor != nil && *anchor == k.Anchor() && errors.Is(err, syscall.EROFS) {
		return nil // nothing is left to be flushed to a disk that is read-only
	}
	return err
}

// settle ends the epochs that are over. That it fails leaves revoked slots open
// for longer, which is loud and tried again, and no reason to stop the cluster.
func (u *Unlocker) settle(ctx context.Context, k *keyring.Keyring) error {
	if u.cfg.Settle == nil {
		return nil
	}
	if err := u.cfg.Settle(ctx, k.Slots()); err != nil {
		return fmt.Errorf("slots of the earlier epoch still open, as it could not be ended: %w", err)
	}
	return nil
}

// announce makes k the open keyring.
func (u *Unlocker) announce(k *keyring.Keyring, by Opener, timing Timing) {
	old := u.open.Swap(k)
	s := State{Open: true, Since: time.Now(), Wrapper: by.Wrapper, Fallback: by.Fallback, Staged: by.Staged, Timing: timing}
	if before := u.State(); before.Open {
		s.Since = before.Since
		if by.Wrapper == "" {
			s.Wrapper, s.Fallback, s.Timing = before.Wrapper, before.Fallback, before.Timing
			if old.StagedID() == k.StagedID() {
				s.Staged = before.Staged
			}
		}
	}
	if id := k.StagedID(); id == "" || k.Holds(id) {
		s.Staged = nil
	}
	if by.Staged != nil {
		u.cfg.Log.Warn("the staged KEK is not open", "cause", seal.CauseOf(by.Staged), "error", by.Staged)
	}
	if by.Fallback != nil {
		u.cfg.Log.Warn("opened by a fallback", "wrapper", by.Wrapper, "cause", seal.CauseOf(by.Fallback), "error", by.Fallback)
	}
	u.state.Store(&s)
	u.cfg.Log.Info("open", "keyID", k.CurrentID(), "revision", k.Revision(), "wrapper", s.Wrapper,
		"gate", timing.Gate, "slots", timing.Slots, "total", timing.Total)
	if old != nil {
		old.Close()
	}
}

func (u *Unlocker) failed(err error, timing Timing) {
	s := u.State()
	s.Problem, s.Timing = err, timing
	s.Attempts++
	u.state.Store(&s)
	if s.Open {
		u.cfg.Log.Error("not all is well; the open keyring goes on serving", "cause", seal.CauseOf(err), "error", err)
	} else {
		u.cfg.Log.Error("locked", "cause", seal.CauseOf(err), "error", err, "attempt", s.Attempts)
	}
}

// Nudge has Run make an attempt now: a reload when open.
func (u *Unlocker) Nudge() {
	select {
	case u.nudge <- struct{}{}:
	default: // one is waiting already
	}
}

// How long Run waits after a failed attempt. A TPM that is busy with quotes for
// nothing wears nothing out, but a slow one is in others' way.
const (
	retryFirst = time.Second
	retryMost  = time.Minute
)

// Run unlocks, again and again until it is open, and reloads when nudged, until
// ctx ends.
func (u *Unlocker) Run(ctx context.Context) {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = retryFirst, retryMost
	attempt := u.Unlock
	for {
		var retry <-chan time.Time
		if attempt(ctx) == nil {
			wait.Reset()
		} else {
			d := wait.NextBackOff()
			u.retryAt(time.Now().Add(d))
			retry = time.After(d)
		}
		select {
		case <-ctx.Done():
			return
		case <-u.nudge:
			attempt = u.Unlock
		case <-retry:
			attempt = u.retry
		}
	}
}

func (u *Unlocker) retryAt(t time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := u.State()
	s.Next = t
	u.state.Store(&s)
}

// Close forgets the KEKs.
func (u *Unlocker) Close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.state.Store(&State{Since: time.Now(), Problem: seal.Errorf(seal.CauseStarting, "start kleidi serve", "kleidi is shutting down")})
	if k := u.open.Swap(nil); k != nil {
		k.Close()
	}
}
