package unlock

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

// HintMissing says what to do if there is no keyring. On a machine that had one before,
// init refuses to make another.
const HintMissing = "run kleidi init if there never was one, else kleidi keyring restore --previous, or kleidi keyring restore BACKUP"

const hintSave = "store the open one again with kleidi keyring save, and don't restart kleidi serve before that"

// Unlocker holds the keyring of one node. Its methods may be called concurrently.
type Unlocker struct {
	cfg   Config
	open  atomic.Pointer[keyring.Keyring]
	state atomic.Pointer[State]
	// encrypted is the key ID of the last Encrypt.
	encrypted atomic.Pointer[seal.KeyID]
	callers   Callers
	// newly has a value once the result of LastEncrypted may have changed.
	newly chan struct{}

	mu      sync.Mutex // held during an attempt or a change
	version store.Version
	// unsettled says that the keyring is open, and that only Settle has failed.
	unsettled bool
	nudge     chan struct{}
	tried     chan struct{} // closed after the first attempt
	once      sync.Once     // closes tried
}

// State describes the state of an Unlocker, for display.
type State struct {
	Open bool `json:"open"`
	// Since is the time at which the keyring was opened or locked.
	Since time.Time `json:"since"`
	// Wrapper is the type of the wrapper that opened the keyring.
	Wrapper string `json:"wrapper,omitempty"`
	// Fallback says why the wrappers before it in the order did not open the keyring.
	// It is nil if Wrapper is the first one.
	Fallback error `json:"-"`
	// Staged says why the staged KEK is not open although the keyring is. Other nodes
	// must not activate that KEK. Staged is nil if no KEK is staged.
	Staged error `json:"-"`
	// Problem says why the keyring is locked, or what failed last while it is open.
	Problem error `json:"-"`
	// Attempts counts the failed attempts since the last success.
	Attempts int       `json:"attempts"`
	Next     time.Time `json:"next,omitzero"`
	Timing   Timing    `json:"timing"`
}

// New returns a locked Unlocker.
func New(cfg Config) *Unlocker {
	u := &Unlocker{cfg: cfg, newly: make(chan struct{}, 1), nudge: make(chan struct{}, 1), tried: make(chan struct{})}
	u.callers = Callers{conns: map[any]caller{}, changed: func() { noteNewly(u) }}
	u.state.Store(&State{Since: time.Now(), Problem: seal.Errorf(seal.CauseStarting, "wait a moment", "the first attempt to unlock has not ended")})
	return u
}

// Tried returns a channel that is closed when the first attempt ends, successful or
// not.
func (u *Unlocker) Tried() <-chan struct{} { return u.tried }

// State returns the current state.
func (u *Unlocker) State() State { return *u.state.Load() }

// Keyring returns the open keyring. If it is locked, the error says why.
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
	noteEncrypted(u, k.CurrentID())
	return k.Encrypt(plaintext)
}

func noteEncrypted(u *Unlocker, id seal.KeyID) {
	if last := u.encrypted.Load(); last == nil || *last != id {
		noted := id
		u.encrypted.Store(&noted)
		noteNewly(u)
	}
}

func noteNewly(u *Unlocker) {
	select {
	case u.newly <- struct{}{}:
	default: // another notice is already waiting
	}
}

// CallersOf returns what u notes of kube-apiserver's connections.
func CallersOf(u *Unlocker) *Callers { return &u.callers }

// NewlyEncrypted returns a channel that has a value once the result of [LastEncrypted] may
// have changed. It is for one reader.
func NewlyEncrypted(u *Unlocker) <-chan struct{} { return u.newly }

// LastEncrypted returns the key ID of u's last Encrypt, or "" if there was none. While a
// connection of kube-apiserver may encrypt under a KEK other than the current one,
// LastEncrypted returns the key ID of that KEK.
func LastEncrypted(u *Unlocker) seal.KeyID {
	last := u.encrypted.Load()
	if last == nil {
		return ""
	}
	if k := u.open.Load(); k != nil && k.CurrentID() == *last {
		if other := u.callers.other(*last); other != "" {
			return other
		}
	}
	return *last
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

// Unlock makes one attempt: load, gate, slots in order, anchor, settle, announce. On an
// open keyring this is a reload.
func (u *Unlocker) Unlock(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	ctx, release := u.hold(ctx)
	defer release()
	defer u.once.Do(func() { close(u.tried) })
	u.unsettled = false
	var timing Timing
	start := time.Now()
	k, version, by, err := u.attempt(ctx, &timing)
	if err != nil && ctx.Err() != nil {
		return err // a cancelled attempt is not a failure
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
	if u.cfg.Witness != nil {
		u.cfg.Witness.Opened(ctx, k)
	}
	u.announce(k, by, timing)
	if u.unsettled = unsettled != nil; u.unsettled {
		u.failed(unsettled, timing)
	}
	return unsettled
}

func (u *Unlocker) hold(ctx context.Context) (context.Context, func()) {
	if u.cfg.Hold == nil {
		return ctx, func() {}
	}
	return u.cfg.Hold(ctx)
}

// retry repeats the step that failed. If only Settle failed, retry opens no slot: the
// slot may be a token's.
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
	u.cfg.Log.Info("the earlier epoch has ended: revoked slots no longer open")
	return nil
}

// Open opens the stored keyring as Unlock does, and returns it. The caller closes it.
// Open saves, anchors and announces nothing.
func (u *Unlocker) Open(ctx context.Context) (*keyring.Keyring, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, _, _, err := u.attempt(ctx, &Timing{})
	return k, err
}

// OpenUnanchored opens a keyring that is not the stored one, through the gate and with
// one of its slots, and returns it. The caller closes it. OpenUnanchored does not check
// the anchor: the caller decides whether to trust the keyring.
func (u *Unlocker) OpenUnanchored(ctx context.Context, untrusted *keyring.Untrusted) (*keyring.Keyring, Opener, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.openWith(ctx, untrusted, nil, &Timing{})
}

// Changed reports whether a reload is useful: because the stored keyring is not the one
// that was last loaded or saved here, can't be read, or failed to open.
func (u *Unlocker) Changed(ctx context.Context) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	_, version, err := u.cfg.Store.Load(ctx)
	return err != nil || version != u.version || u.State().Problem != nil
}

// follows fails if k does not hold the current KEK of the open keyring, or has an older
// revision. So nobody who puts back both an older keyring and an older anchor can make
// this process forget a key ID that it announced.
func (u *Unlocker) follows(k *keyring.Keyring) error {
	open := u.open.Load()
	if open == nil || k.ClusterID() == open.ClusterID() && k.Holds(open.CurrentID()) && k.Revision() >= open.Revision() {
		return nil
	}
	return seal.Errorf(seal.CauseAnchor, "if the open one is the right one, "+hintSave,
		"the stored keyring has revision %d and does not follow the open one, which has revision %d and key ID %s", k.Revision(), open.Revision(), open.CurrentID())
}

// anchor saves the anchor of k, even if it is stored already: an earlier flush of the
// folder, which also holds the keyring, may have failed. If anchor fails, k is not
// announced, because an announced keyring must not be rolled back.
func (u *Unlocker) anchor(ctx context.Context, k *keyring.Keyring) error {
	anchor, err := u.cfg.Anchor.Load(ctx)
	if err != nil {
		return err
	}
	err = u.cfg.Anchor.Save(ctx, k.Anchor())
	if anchor != nil && *anchor == k.Anchor() && errors.Is(err, syscall.EROFS) {
		return nil // a read-only disk has nothing to flush
	}
	return err
}

// settle ends the epochs before that of k. If settle fails, revoked slots can still be
// opened. That is logged and tried again, but it must not stop the cluster.
func (u *Unlocker) settle(ctx context.Context, k *keyring.Keyring) error {
	if u.cfg.Settle == nil {
		return nil
	}
	if err := u.cfg.Settle(ctx, k.Slots()); err != nil {
		return fmt.Errorf("slots of the earlier epoch still open, because the epoch could not be ended: %w", err)
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
		u.cfg.Log.Error("attempt failed; still serving the open keyring", "cause", seal.CauseOf(err), "error", err)
	} else {
		u.cfg.Log.Error("locked", "cause", seal.CauseOf(err), "error", err, "attempt", s.Attempts)
	}
}

// Nudge makes Run attempt to unlock now. On an open keyring the attempt is a reload.
func (u *Unlocker) Nudge() {
	select {
	case u.nudge <- struct{}{}:
	default: // an earlier nudge is still waiting
	}
}

// Bounds of the time that Run waits after a failed attempt. More attempts would not
// wear out a TPM, but would keep a slow one busy while others wait for it.
const (
	retryFirst = time.Second
	retryMost  = time.Minute
)

// Run makes attempts until the keyring is open. From then on it reloads the keyring
// when it is nudged. After a permanent failure Run waits for a nudge. Run returns when
// ctx ends.
func (u *Unlocker) Run(ctx context.Context) {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = retryFirst, retryMost
	attempt := u.Unlock
	for {
		var retry <-chan time.Time
		switch err := attempt(ctx); {
		case err == nil:
			wait.Reset()
		case permanent(err):
			wait.Reset()
			u.retryAt(time.Time{})
			u.cfg.Log.Info("this is not tried again before a SIGHUP, a change of the keyring or a restart", "cause", seal.CauseOf(err))
		default:
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

// AwaitAttempt waits for the end of the attempt or change that is going on, if there is
// one.
func AwaitAttempt(u *Unlocker) {
	u.mu.Lock()
	defer u.mu.Unlock()
}

// Lock closes u's open keyring because of why, which State shows from then on. A later
// attempt may open it again.
func Lock(u *Unlocker, why error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.state.Store(&State{Since: time.Now(), Problem: why})
	if k := u.open.Swap(nil); k != nil {
		k.Close()
	}
	u.cfg.Log.Error("locked", "cause", seal.CauseOf(why), "error", why)
}

// Close closes the open keyring, and thereby its KEKs.
func (u *Unlocker) Close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.state.Store(&State{Since: time.Now(), Problem: seal.Errorf(seal.CauseStarting, "start kleidi serve", "kleidi is shutting down")})
	if k := u.open.Swap(nil); k != nil {
		k.Close()
	}
}
