package unlock

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
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
	Store Store
	Pin   Pin
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
	nudge   chan struct{}
	tried   chan struct{} // closed after the first attempt
	once    sync.Once
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
	k, err := u.Keyring()
	if err != nil {
		return nil, err
	}
	return k.Decrypt(id, ciphertext)
}

// Unlock makes one attempt: load, gate, slots in order, pin, settle, announce. It
// does the same when open, so it is a reload too.
func (u *Unlocker) Unlock(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	defer u.once.Do(func() { close(u.tried) })
	var timing Timing
	start := time.Now()
	k, version, by, err := u.attempt(ctx, &timing)
	if err != nil && ctx.Err() != nil {
		return err // it was told to stop, which is nothing to report
	}
	if err != nil {
		err = u.whileOpen(ctx, err)
	} else if err = u.follows(k); err == nil {
		err = u.pin(ctx, k)
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
	if unsettled != nil {
		u.failed(unsettled, timing)
	}
	return unsettled
}

// Open opens the stored keyring as Unlock does, for the caller alone, who closes
// it. Nothing is saved, pinned or announced.
func (u *Unlocker) Open(ctx context.Context) (*keyring.Keyring, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, _, _, err := u.attempt(ctx, &Timing{})
	return k, err
}

// OpenUnpinned opens another keyring than the stored one through the gate and with
// a slot, for the caller alone, who closes it. The pin is not asked: the caller
// finds out whether the keyring is to be trusted.
func (u *Unlocker) OpenUnpinned(ctx context.Context, untrusted *keyring.Untrusted) (*keyring.Keyring, Opener, error) {
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

// attempt loads the keyring and opens it with the first slot that opens.
func (u *Unlocker) attempt(ctx context.Context, timing *Timing) (*keyring.Keyring, store.Version, Opener, error) {
	start := time.Now()
	untrusted, pin, version, err := u.load(ctx)
	timing.Load = time.Since(start)
	if err != nil {
		return nil, "", Opener{}, err
	}
	k, by, err := u.openWith(ctx, untrusted, pin, timing)
	return k, version, by, err
}

// openWith is the gate, then the slots, then the keyring's own checks.
func (u *Unlocker) openWith(ctx context.Context, untrusted *keyring.Untrusted, pin *keyring.Pin, timing *Timing) (*keyring.Keyring, Opener, error) {
	start := time.Now()
	var gate error
	if u.cfg.Gate != nil {
		gate = u.cfg.Gate.Attest(ctx, untrusted.Slots())
	}
	timing.Gate = time.Since(start)
	start = time.Now()
	kek, by, err := u.unwrap(ctx, untrusted.Slots(), gate)
	timing.Slots = time.Since(start)
	if err != nil {
		return nil, by, err
	}
	k, err := untrusted.Open(kek, pin)
	if err != nil {
		kek.Close()
		return nil, by, err
	}
	return k, by, nil
}

// Opener is which wrapper opened a slot, and why those before it did not.
type Opener struct {
	// Wrapper is its type.
	Wrapper string
	// Fallback is nil where it is the first one.
	Fallback error
}

func (u *Unlocker) load(ctx context.Context) (*keyring.Untrusted, *keyring.Pin, store.Version, error) {
	raw, version, err := u.cfg.Store.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, "", seal.Errorf(seal.CauseKeyringMissing, HintMissing, "there is no keyring: %w", err)
	}
	if err != nil {
		return nil, nil, "", storeError("keyring", err)
	}
	untrusted, err := keyring.Parse(raw)
	if err != nil {
		return nil, nil, "", err
	}
	pin, err := u.cfg.Pin.Load(ctx)
	if err != nil {
		return nil, nil, "", err
	}
	if pin == nil {
		return nil, nil, "", seal.Errorf(seal.CausePin, "put the pin file back, or run kleidi recover with the recovery identity",
			"there is a keyring but no pin, so nothing says that it is this node's keyring")
	}
	return untrusted, pin, version, nil
}

// unwrap tries the slots, wrapper by wrapper in the configured order. A slot that
// is not a wrapper's own is passed over. Only configured wrappers are tried, so
// that a failing TPM gives way to another wrapper only where the operator said so.
func (u *Unlocker) unwrap(ctx context.Context, slots []seal.Slot, gate error) (*seal.Secret, Opener, error) {
	failure := gate
	for _, w := range u.cfg.Wrappers {
		var refusal error
		for _, s := range slots {
			if !u.passes(gate, w, s) {
				continue
			}
			kek, err := w.Unwrap(ctx, s)
			if err == nil {
				return kek, u.openedBy(w, gate, failure), nil
			}
			if !errors.Is(err, seal.ErrNotMine) && (refusal == nil || moreTelling(err, refusal)) {
				refusal = err
			}
		}
		if refusal != nil && u.cfg.Gate != nil {
			refusal = u.cfg.Gate.Explain(refusal)
		}
		failure = both(failure, w.Type(), refusal)
	}
	if failure == nil {
		failure = seal.Errorf(seal.CauseNoSlot, "if this machine was renamed, set node to its former name; else run kleidi recover with the recovery identity",
			"the keyring holds no slot for this node and its configured wrappers, but for %s", owners(slots))
	}
	return nil, Opener{}, failure
}

// passes reports whether a wrapper may be tried on a slot after what the gate said.
func (u *Unlocker) passes(gate error, w seal.Wrapper, s seal.Slot) bool {
	if gate == nil || u.ungated(w) {
		return true
	}
	o, ok := errors.AsType[Overruled](gate)
	return ok && w.Type() == s.Type && o.Overrules(s)
}

func (u *Unlocker) ungated(w seal.Wrapper) bool {
	return u.cfg.Ungated != nil && u.cfg.Ungated(w.Type())
}

// openedBy tells a fallback from the first wrapper, and says so where a suspension
// has overruled the gate.
func (u *Unlocker) openedBy(w seal.Wrapper, gate, earlier error) Opener {
	if _, ok := errors.AsType[Overruled](gate); ok && !u.ungated(w) {
		u.cfg.Log.Warn("the boot policy refuses this boot; the suspension overrules it", "error", gate)
		return Opener{Wrapper: w.Type()}
	}
	return Opener{w.Type(), earlier}
}

// both is the failure of the wrappers so far, with that of the next one in its text:
// where a fallback fails too, its remedy may be the nearer one.
func both(failure error, kind string, next error) error {
	if failure == nil || next == nil {
		return cmp.Or(failure, next)
	}
	text, hint := seal.SplitHint(failure)
	return &seal.Error{Cause: seal.CauseOf(failure), Hint: hint, Err: &failures{failure, fmt.Sprintf("%s; %s does not open either: %s", text, kind, next)}}
}

// failures is one failure in whose text others stand too.
type failures struct {
	first error
	text  string
}

func (f *failures) Error() string { return f.text }
func (f *failures) Unwrap() error { return f.first }

// owners lists whose slots there are.
func owners(slots []seal.Slot) string {
	var all []string
	for _, s := range slots {
		name := s.Type
		if s.Node != "" {
			name += " of node " + s.Node
		}
		all = append(all, name)
	}
	return strings.Join(all, ", ")
}

// moreTelling prefers the slot that got furthest to one for another boot: the TPM
// asks for the PCRs first. Where a slot is revoked the keyring is an old one; where
// a verifier does not agree, or can't be asked, that is what is to be mended.
func moreTelling(err, than error) bool {
	further := []seal.Cause{seal.CauseEpoch, seal.CauseBootPolicy, seal.CauseAttestation, seal.CauseUnavailable, seal.CauseKeyMissing, seal.CauseCredentials}
	return seal.CauseOf(than) == seal.CauseBootState && slices.Contains(further, seal.CauseOf(err))
}

// follows refuses to go back, while a keyring is open, to one without its current
// KEK or of an older revision: whoever could put both an older keyring and an older
// pin in place can't make this process forget what it announced.
func (u *Unlocker) follows(k *keyring.Keyring) error {
	open := u.open.Load()
	if open == nil || k.ClusterID() == open.ClusterID() && k.Holds(open.CurrentID()) && k.Revision() >= open.Revision() {
		return nil
	}
	return seal.Errorf(seal.CausePin, "if the open one is the right one, "+hintSave,
		"the stored keyring is of revision %d and does not follow the open one of revision %d with key ID %s", k.Revision(), open.Revision(), open.CurrentID())
}

// whileOpen puts the best remedy first where what is stored is gone, damaged or
// another keyring, and what is open is whole.
func (u *Unlocker) whileOpen(ctx context.Context, err error) error {
	e, ok := errors.AsType[*seal.Error](err)
	if u.open.Load() == nil || !ok {
		return err
	}
	_, version, loadErr := u.cfg.Store.Load(ctx)
	if loadErr == nil && version == u.version && e.Cause != seal.CausePin {
		return err // the stored keyring is the open one: something else is wrong
	}
	return &seal.Error{Cause: e.Cause, Err: e.Err, Hint: hintSave + "; or, if the change was yours: " + e.Hint}
}

const hintSave = "store the open one again with kleidi keyring save, and don't restart kleidi serve before"

// Save stores the open keyring in the place of whatever is stored.
func (u *Unlocker) Save(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, err := u.Keyring()
	if err != nil {
		return err
	}
	_, version, err := u.cfg.Store.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return seal.Errorf(seal.CauseStore, "move that file away, then run the command again", "the stored keyring: %w", err)
	}
	ctx = context.WithoutCancel(ctx)
	if u.version, err = u.cfg.Store.Save(ctx, k.Marshal(), version); err != nil {
		return storeError("keyring", err)
	}
	if err := u.cfg.Pin.Replace(ctx, k.Pin()); err != nil { // what is open vouches for it
		return err
	}
	s := u.State()
	s.Problem, s.Attempts = nil, 0
	u.state.Store(&s)
	u.Nudge()
	return nil
}

// pin pins k, also where the pin is there already: the flush of the folder, which
// holds the keyring too, may have failed after either was saved. Where the pin
// can't be saved, k is not announced: what was announced must not be rolled back.
func (u *Unlocker) pin(ctx context.Context, k *keyring.Keyring) error {
	pin, err := u.cfg.Pin.Load(ctx)
	if err != nil {
		return err
	}
	err = u.cfg.Pin.Save(ctx, k.Pin())
	if pin != nil && *pin == k.Pin() && errors.Is(err, syscall.EROFS) {
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
	s := State{Open: true, Since: time.Now(), Wrapper: by.Wrapper, Fallback: by.Fallback, Timing: timing}
	if before := u.State(); before.Open {
		s.Since = before.Since
		if by.Wrapper == "" {
			s.Wrapper, s.Fallback, s.Timing = before.Wrapper, before.Fallback, before.Timing
		}
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
	for {
		var retry <-chan time.Time
		if u.Unlock(ctx) == nil {
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
		case <-retry:
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

// Change saves what f makes of the open keyring, one revision after the other,
// and announces the last. If it fails before the first is saved, nothing has
// changed. After that a new revision is on disk, and Run, which is nudged, opens
// it. f closes what it made when it fails.
func (u *Unlocker) Change(ctx context.Context, f func(*keyring.Keyring) ([]*keyring.Keyring, error)) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, err := u.Keyring()
	if err != nil {
		return err
	}
	revisions, err := f(k)
	if err != nil {
		return err
	}
	return u.commit(ctx, revisions, Opener{}, u.pin)
}

// Adopt does the same with revisions of a keyring that was opened in another way,
// by the recovery identity for instance; by says how. version is that of the stored keyring
// that they replace.
func (u *Unlocker) Adopt(ctx context.Context, version store.Version, by Opener, revisions []*keyring.Keyring) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.version = version
	return u.commit(ctx, revisions, by, func(ctx context.Context, k *keyring.Keyring) error { return u.cfg.Pin.Replace(ctx, k.Pin()) })
}

func (u *Unlocker) commit(ctx context.Context, revisions []*keyring.Keyring, by Opener, pin func(context.Context, *keyring.Keyring) error) error {
	ctx = context.WithoutCancel(ctx) // from here on it is carried to its end
	last := revisions[len(revisions)-1]
	for _, k := range revisions {
		if k != last {
			defer k.Close()
		}
	}
	if err := u.save(ctx, revisions, pin); err != nil {
		last.Close()
		return err
	}
	unsettled := u.settle(ctx, last)
	u.announce(last, by, Timing{})
	if unsettled != nil {
		return fmt.Errorf("the new keyring is saved and in use; %w", u.again(unsettled))
	}
	return nil
}

func (u *Unlocker) save(ctx context.Context, revisions []*keyring.Keyring, pin func(context.Context, *keyring.Keyring) error) error {
	for _, k := range revisions {
		version, err := u.cfg.Store.Save(ctx, k.Marshal(), u.version)
		if errors.Is(err, store.ErrConflict) {
			return seal.Errorf(seal.CauseStore, "run kleidi status, then try again", "the stored keyring was changed by someone else; it is read anew: %w", u.again(err))
		}
		if err != nil {
			return storeError("keyring", u.again(err))
		}
		u.version = version
	}
	if err := pin(ctx, revisions[len(revisions)-1]); err != nil {
		return fmt.Errorf("the new keyring is saved and not yet announced: %w", u.again(err))
	}
	return nil
}

// again nudges Run, for what is on disk may differ from what is open.
func (u *Unlocker) again(err error) error {
	u.Nudge()
	return err
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
