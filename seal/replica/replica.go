package replica

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

const (
	// interval is how often the store is read in addition to the watch: a watch that
	// was open while the store was restored misses changes.
	interval = 30 * time.Second
	// readEach bounds how often records are read for display while other nodes follow: each
	// node reads the records of all nodes.
	readEach = 200 * time.Millisecond
	// lookWithin bounds how long the first announcement waits for the store.
	lookWithin = 5 * time.Second
)

// Config configures a Replica.
type Config struct {
	Store    Store
	Unlocker *unlock.Unlocker
	// Wrap returns this node's own slots for the staged KEK of k, one for each boot
	// state in which the node starts. Each slot was opened once.
	Wrap func(ctx context.Context, k *keyring.Keyring, kek *seal.Secret) ([]seal.Slot, error)
	// BootStates returns these boot states, so that other nodes can wrap a KEK for
	// them. It is called when the node's own slots have changed.
	BootStates func(ctx context.Context, k *keyring.Keyring) ([]keyring.RecordedState, error)
	// Machine describes this machine's TPM, as its entry in the keyring does; nil means that
	// the node has none.
	Machine func(ctx context.Context) (keyring.Node, error)
	// Archives returns what may be the archive of a pruned KEK, by the argument that kleidi
	// keyring import-archive needs to read it; nil finds none.
	Archives func(ctx context.Context, id seal.KeyID) map[string][]byte
	// Removal keeps the keyring that removed this node; nil keeps none.
	Removal Removal
	Version string
	Log     *slog.Logger
}

// Replica keeps one node in step. Its methods may be called concurrently.
type Replica struct {
	cfg     Config
	started time.Time // for the record
	began   time.Time // with a monotonic reading
	kick    chan struct{}
	looked  chan struct{} // closed once the store was read or found unreachable
	look    sync.Once

	mu         sync.Mutex // held during a round
	everInStep bool
	last       []byte      // the store's content at the last read
	removed    error       // the reason why this node is removed, if it is
	statesOf   []seal.Slot // the own slots that states belong to
	states     []keyring.RecordedState

	stateMu sync.Mutex
	state   State
	round   chan struct{} // closed at the end of a round
}

// State is a node's knowledge of the cluster store.
type State struct {
	// Reached is the time of the last read of the store; zero means never.
	Reached time.Time
	// Away says that a later attempt to read the store failed.
	Away bool
	// Revision is the revision of the keyring in the store at that time.
	Revision uint64
	// InStep says that the keyring in the store was the open one.
	InStep bool
	// Problem is the reason why the last round failed. A node can be in step and yet fail
	// to write its record.
	Problem error
	// Reports are the nodes' records as they were last read, at ReportsRead, and this
	// node's own as it was last written.
	Reports     []Report
	ReportsRead time.Time
}

// bootStates asks the TPM only when this node's own slots have changed, since every round
// makes a record.
func (r *Replica) bootStates(ctx context.Context, k *keyring.Keyring) ([]keyring.RecordedState, error) {
	own := k.OwnSlots()
	if r.cfg.BootStates == nil || r.states != nil && reflect.DeepEqual(own, r.statesOf) {
		return r.states, nil
	}
	states, err := r.cfg.BootStates(ctx, k)
	if err == nil {
		r.statesOf, r.states = own, states
	}
	return states, err
}

// Report is a node of the keyring, with its record in the store.
type Report struct {
	Node string
	// Record is nil if no record verifies.
	Record *keyring.VerifiedRecord
	// Counts says that the record was written after the keyring in the store. Only such a
	// record counts in a decision.
	Counts bool
}

// New returns a Replica that does nothing yet.
func New(cfg Config) *Replica {
	now := time.Now()
	return &Replica{cfg: cfg, started: now.UTC().Truncate(time.Second), began: now, kick: make(chan struct{}, 1), looked: make(chan struct{}), round: make(chan struct{})}
}

// Round returns a channel that is closed when the next round ends.
func (r *Replica) Round() <-chan struct{} {
	r.stateMu.Lock()
	defer r.stateMu.Unlock()
	return r.round
}

func (r *Replica) endRound() {
	r.stateMu.Lock()
	defer r.stateMu.Unlock()
	close(r.round)
	r.round = make(chan struct{})
}

// State returns the state after the last round.
func (r *Replica) State() State {
	r.stateMu.Lock()
	defer r.stateMu.Unlock()
	return r.state
}

func (r *Replica) update(f func(*State)) {
	r.stateMu.Lock()
	defer r.stateMu.Unlock()
	f(&r.state)
}

// Kick makes Run start a round now.
func (r *Replica) Kick() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Run makes rounds until ctx ends.
func (r *Replica) Run(ctx context.Context) {
	var watch sync.WaitGroup
	defer watch.Wait()
	watch.Go(func() { r.cfg.Store.Watch(ctx, r.Kick) })
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = time.Second, interval
	said, revision := "", uint64(0)
	var p pace
	select { // a round before the first attempt to unlock would do nothing
	case <-r.cfg.Unlocker.Tried():
	case <-ctx.Done():
	}
	for ctx.Err() == nil {
		next := interval
		_, locked := r.cfg.Unlocker.Keyring()
		err := r.Sync(ctx)
		if now := r.State().Revision; now != revision {
			revision = now
			wait.Reset()
		}
		switch {
		case err != nil || r.awaitsOthers():
			next = wait.NextBackOff()
		case locked != nil:
			next = time.Second // an attempt to unlock kicks before its result is visible
		default:
			wait.Reset()
		}
		if text := fmt.Sprint(err); text != said && ctx.Err() == nil && (err != nil || locked == nil) {
			_, lockedNow := r.cfg.Unlocker.Keyring()
			switch {
			case err != nil && lockedNow != nil: // the round has locked the node, which is in the log
			case err != nil:
				said = text
				r.cfg.Log.Error("not in step with the cluster store; this node keeps serving", "cause", seal.CauseOf(err), "error", err)
			default:
				said = text
				r.cfg.Log.Info("in step with the cluster store", "revision", r.State().Revision)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(next):
		case <-unlock.NewlyEncrypted(r.cfg.Unlocker): // the node's record names that KEK
		case <-r.kick:
		}
		select {
		case <-ctx.Done():
		case <-time.After(p.wait(time.Now())): // the store may change without end
		}
	}
}

// Sync makes one round. It does nothing while the node is locked, or while the keyring
// has only one node.
func (r *Replica) Sync(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil { // an attempt kicks at its end, before its result is visible
		unlock.AwaitAttempt(r.cfg.Unlocker)
		k, err = r.cfg.Unlocker.Keyring()
	}
	if err != nil || k.Shared() == nil {
		return nil
	}
	defer r.endRound()
	err = r.remove(ctx, k, r.getInStep(ctx))
	if err != nil {
		r.update(func(s *State) { s.Problem, s.InStep = err, false })
	}
	if seal.CauseOf(err) == seal.CauseNodeRemoved && !r.everInStep {
		unlock.Lock(r.cfg.Unlocker, err)
		return err
	}
	if _, ok := errors.AsType[unread](err); ok { // a record can't be written either
		return err
	}
	if recordErr := r.record(ctx, err); err == nil {
		err = recordErr // the node is in step, but the others wait for its record
	} else {
		err = errors.Join(err, recordErr)
	}
	r.update(func(s *State) { s.Problem = err })
	age := time.Since(r.State().ReportsRead)
	if age >= interval || r.awaitsOthers() && age >= time.Duration(len(k.Nodes()))*readEach { // for display
		_, _ = r.Reports(ctx)
	}
	return err
}

// awaitsOthers reports whether a node had not followed the present keyring when the
// records were last read, or a rotation waited for one.
func (r *Replica) awaitsOthers() bool {
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil || k.Format() == 1 {
		return false
	}
	records := counting(r.State().Reports)
	return len(rotation.Behind(k, records)) > 0 || rotation.Next(k, "", records).Do == rotation.Wait
}

// rounds bounds how often a round restarts because another node was faster.
const rounds = 8

func (r *Replica) getInStep(ctx context.Context) error {
	for range rounds {
		again, err := r.step(ctx)
		if err != nil {
			return err
		}
		if !again {
			if !r.everInStep || r.removed != nil {
				r.forgetRemoval(ctx)
			}
			r.everInStep = true
			r.update(func(s *State) { s.InStep = true })
			return r.acknowledge(ctx)
		}
	}
	return errors.New("the cluster store changes faster than this node follows")
}

// unread is the reason why the store could not be read.
type unread struct{ error }

// Unwrap returns the reason.
func (e unread) Unwrap() error { return e.error }

// step reads the store, and follows or publishes. It reports whether to read the store
// again.
func (r *Replica) step(ctx context.Context) (again bool, err error) {
	raw, err := r.cfg.Store.Load(ctx)
	if absent := errors.Is(err, fs.ErrNotExist); err == nil || absent || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, ErrNoStore) {
		defer r.look.Do(func() { close(r.looked) })
		if absent {
			r.update(func(s *State) { s.Reached, s.Away, s.Revision = time.Now(), false, 0 })
			return r.create(ctx)
		}
	}
	if err != nil {
		r.update(func(s *State) { s.Away = true })
		return false, unread{seal.Caused(seal.CauseUnavailable, hintStore, "the cluster store", err)}
	}
	r.last = raw
	remote, err := keyring.Parse(raw)
	if err != nil {
		return false, fmt.Errorf("the cluster store: %w", err)
	}
	r.update(func(s *State) { s.Reached, s.Away, s.Revision = time.Now(), false, remote.Revision() })
	err = r.cfg.Unlocker.Follow(ctx, remote, nil)
	if seal.CauseOf(err) == seal.CauseNodeRemoved && r.cfg.Machine != nil {
		err = r.followAsMachine(ctx, remote, err)
	}
	switch {
	case err == nil:
		r.cfg.Log.Info("followed the cluster store", "revision", remote.Revision(), "keyID", remote.CurrentID())
		return true, nil
	case errors.Is(err, keyring.ErrInStep):
		return false, nil
	case errors.Is(err, keyring.ErrStagedClosed):
		return true, r.cfg.Unlocker.OpenStaged(ctx)
	case errors.Is(err, keyring.ErrNotAcknowledged): // this node's slots were replaced after it had acknowledged the KEK
		return true, r.acknowledge(ctx)
	default: // the keyring may be an older one, under a KEK that this node has retired
		return true, r.publish(ctx, raw, remote, err)
	}
}

// followAsMachine follows a keyring that lists another TPM for this node than the node's own
// keyring does, if it is this machine's: the node has changed its own entry, with kleidi reseal
// --new-tpm, and died before it had stored the keyring. Otherwise it returns removed, even if
// the TPM does not answer.
func (r *Replica) followAsMachine(ctx context.Context, remote *keyring.Untrusted, removed error) error {
	machine, err := r.cfg.Machine(ctx)
	if err != nil {
		return removed
	}
	err = r.cfg.Unlocker.Follow(ctx, remote, &machine)
	if err == nil {
		r.cfg.Log.Warn("a change of this node's TPM had broken off; run kleidi reseal --new-tpm again")
	}
	return err // a full disk, for instance, removes no node
}

// create puts the keyring into an empty store. The node with the seat thereby hands the
// keyring over. A store that is empty later was restored from an early snapshot.
func (r *Replica) create(ctx context.Context) (again bool, err error) {
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil {
		return false, err
	}
	if k.Info().Commit == keyring.CommitCluster {
		return true, conflictIsNews(r.cfg.Store.Swap(ctx, nil, k.Shared()))
	}
	if self, ok := k.Self(); !ok || self.Name != k.Info().Seat {
		return false, fmt.Errorf("the cluster store is empty; node %s hands the keyring over to it", k.Info().Seat)
	}
	err = r.cfg.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.InCluster()
		return []*keyring.Keyring{next}, err
	})
	if err == nil {
		r.cfg.Log.Info("the cluster store holds the keyring from now on")
	}
	return true, err
}

// publish replaces an older keyring in the store with the node's own. If the store's
// keyring is not older, unfollowed is the reason why the node did not follow it.
func (r *Replica) publish(ctx context.Context, raw []byte, remote *keyring.Untrusted, unfollowed error) error {
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil {
		return err
	}
	if err := keyring.Precedes(remote, k); seal.CauseOf(err) == seal.CauseForked {
		return fmt.Errorf("the cluster store: %w", err)
	} else if err != nil {
		return fmt.Errorf("the cluster store: %w", cmp.Or(r.pruned(ctx, k, remote), unfollowed))
	}
	if k.Info().Commit != keyring.CommitCluster {
		return fmt.Errorf("the cluster store holds revision %d, which is before this node's (%d); node %s hands the keyring over to it", remote.Revision(), k.Revision(), k.Info().Seat)
	}
	// This node may have changed the keyring since the read. Then the swap conflicts.
	err = r.cfg.Store.Swap(ctx, raw, k.Shared())
	if err == nil {
		r.cfg.Log.Warn("the cluster store was older than this node's keyring, as after a restore; published this node's", "theirs", remote.Revision(), "own", k.Revision())
	}
	return conflictIsNews(err)
}

// pruned returns an error if the store's keyring is under a pruned KEK: etcd was then
// restored from a snapshot that is older than the prune.
func (r *Replica) pruned(ctx context.Context, k *keyring.Keyring, remote *keyring.Untrusted) error {
	id := remote.CurrentID()
	if r.cfg.Archives == nil || remote.ClusterID() != k.ClusterID() || k.Holds(id) || id == k.StagedID() {
		return nil
	}
	archive := ""
	for argument, b := range r.cfg.Archives(ctx, id) {
		if u, err := keyring.ParseArchive(b); err == nil && u.Info().KeyID == id && u.Verify(k) == nil {
			archive = max(archive, argument) // the cluster store's, if both are there
		}
	}
	if archive == "" {
		return nil
	}
	return seal.Errorf(seal.CauseAnchor, "if etcd was restored from a snapshot that is older than the prune, bring the KEK back with kleidi keyring import-archive "+archive+" and the recovery identity; otherwise find out who else writes to the cluster store",
		"the keyring of revision %d is under key ID %s, whose KEK this cluster has pruned", remote.Revision(), id)
}

// conflictIsNews turns a conflict into nil: the caller reads the store again.
func conflictIsNews(err error) error {
	if errors.Is(err, store.ErrConflict) {
		return nil
	}
	return err
}

// acknowledge opens the staged KEK, and seals it for this node.
func (r *Replica) acknowledge(ctx context.Context) error {
	if err := r.cfg.Unlocker.OpenStaged(ctx); err != nil {
		return err
	}
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil || k.StagedID() == "" || k.Acknowledged() {
		return err
	}
	return r.cfg.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		kek := keyring.StagedKEK(k)
		if kek == nil {
			return nil, errors.New("acknowledge: no staged KEK is open")
		}
		slots, err := r.cfg.Wrap(ctx, k, kek)
		if err != nil {
			return nil, fmt.Errorf("seal the staged KEK: %w", err)
		}
		next, err := k.WithOwnSlots(k.OwnSlots(), slots)
		return []*keyring.Keyring{next}, err
	})
}

// record writes this node's record unless the store holds it. A record from before the
// present keyring does not count, so it is written again.
func (r *Replica) record(ctx context.Context, problem error) error {
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil {
		return nil
	}
	self, ok := k.Self()
	if !ok {
		return nil
	}
	b, err := r.sign(ctx, k, self.Name, problem)
	if err != nil {
		return err
	}
	there, err := r.cfg.Store.Records(ctx, self.Name)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	if len(there) != 1 || !there[0].AfterKeyring || !bytes.Equal(there[0].Bytes, b) {
		if err := r.cfg.Store.PutRecord(ctx, self.Name, b); err != nil {
			r.remember(k, self.Name, there)
			return fmt.Errorf("record: %w", err)
		}
	}
	r.remember(k, self.Name, []store.NodeRecord{{Node: self.Name, Bytes: b, AfterKeyring: true}})
	return nil
}

// remember puts the store's present record of this node, if there is one, among the
// reports: the next read of all records may be interval away, and until then status and the
// metrics would show an older record.
func (r *Replica) remember(k *keyring.Keyring, self string, present []store.NodeRecord) {
	mine := Report{Node: self}
	if len(present) == 1 {
		mine.read(k, present[0])
	}
	r.update(func(s *State) {
		all := slices.Clone(s.Reports) // readers hold the former slice
		if at := slices.IndexFunc(all, func(n Report) bool { return n.Node == self }); at >= 0 {
			all[at] = mine
		} else {
			all = append(all, mine)
		}
		s.Reports = all
	})
}

// sign returns the record of this node, whose name is name.
func (r *Replica) sign(ctx context.Context, k *keyring.Keyring, name string, problem error) (b []byte, err error) {
	rec := keyring.Record{
		Node: name, Formats: keyring.Formats(), Version: r.cfg.Version, Revision: k.Revision(),
		// The open keyring was saved and anchored before, so these three are equal.
		Anchored: k.CurrentID(), Announced: k.CurrentID(), Encrypted: unlock.LastEncrypted(r.cfg.Unlocker), Started: r.started,
	}
	if id := k.StagedID(); id != "" && k.Holds(id) && k.Acknowledged() {
		rec.Acknowledged = id
	}
	if problem = cmp.Or(problem, r.cfg.Unlocker.State().Problem); problem != nil {
		rec.Problem = seal.OneLine(problem.Error(), keyring.MaxText)
	}
	if rec.BootStates, err = r.bootStates(ctx, k); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	return k.SignRecord(rec)
}

// Records returns the records of the nodes of k that verify and count: those written
// after the keyring in the store.
func (r *Replica) Records(ctx context.Context, k *keyring.Keyring) ([]*keyring.VerifiedRecord, error) {
	reports, err := r.reports(ctx, k)
	return counting(reports), err
}

func counting(reports []Report) (all []*keyring.VerifiedRecord) {
	for _, n := range reports {
		if n.Counts {
			all = append(all, n.Record)
		}
	}
	return all
}

// Reports reads the records of the nodes of the open keyring, for display.
func (r *Replica) Reports(ctx context.Context) ([]Report, error) {
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil {
		return nil, err
	}
	return r.reports(ctx, k)
}

func (r *Replica) reports(ctx context.Context, k *keyring.Keyring) ([]Report, error) {
	var names []string
	for _, n := range k.Nodes() {
		names = append(names, n.Name)
	}
	stored, err := r.cfg.Store.Records(ctx, names...)
	if err != nil {
		return nil, seal.Caused(cmp.Or(seal.CauseOf(err), seal.CauseUnavailable), hintStore, "the records in the cluster store", err)
	}
	all := make([]Report, len(names))
	for i, name := range names {
		all[i].Node = name
		if at := slices.IndexFunc(stored, func(s store.NodeRecord) bool { return s.Node == name }); at >= 0 {
			all[i].read(k, stored[at])
		}
	}
	r.update(func(s *State) { s.Reports, s.ReportsRead = all, time.Now() })
	return all, nil
}

func (n *Report) read(k *keyring.Keyring, there store.NodeRecord) {
	u, err := keyring.ParseRecord(there.Bytes)
	if err != nil || u.Node() != there.Node {
		return
	}
	if v, err := u.Verify(k); err == nil {
		n.Record, n.Counts = v, there.AfterKeyring
	}
}

// Commit puts a revision of the shared keyring into the store in place of old. The
// change then counts as made; see unlock.Config.
func (r *Replica) Commit(ctx context.Context, old, next *keyring.Keyring) error {
	if err := r.mayActivate(ctx, old, next); err != nil {
		return err
	}
	var from []byte // an empty store, until the seat has handed the keyring over
	if old.Info().Commit == keyring.CommitCluster {
		from = old.Shared()
	}
	defer r.Kick() // the other nodes wait for this node's record, too
	switch err := r.cfg.Store.Swap(ctx, from, next.Shared()); {
	case errors.Is(err, store.ErrConflict):
		return seal.Errorf(seal.CauseStore, "run the command again once this node has followed", "another node has changed the shared keyring meanwhile; this change was not made: %w", err)
	case seal.CauseOf(err) == seal.CauseCredentials || seal.CauseOf(err) == seal.CauseConfiguration:
		return fmt.Errorf("this change was not made: the cluster store: %w", err)
	case err != nil:
		return seal.Errorf(seal.CauseUnavailable, "run kleidi status in a moment, then try again if the change is not there", "the cluster store did not answer whether the change was made: %w", err)
	}
	return nil
}

// mayActivate refuses to make another KEK current before every node has acknowledged it.
// Nothing overrules this.
func (r *Replica) mayActivate(ctx context.Context, old, next *keyring.Keyring) error {
	if next.CurrentID() == old.CurrentID() || len(next.Nodes()) < 2 {
		return nil
	}
	if next.CurrentID() != old.StagedID() {
		return errors.New("the KEK of several nodes is replaced in steps; run kleidi rotate")
	}
	records, err := r.Records(ctx, old)
	if err != nil {
		return err
	}
	if s := rotation.Next(old, "", records); s.Do != rotation.Activate {
		return fmt.Errorf("the staged KEK can't be activated before every node has acknowledged it: %s", rotation.Describe(s.Missing))
	}
	return nil
}

// Look waits until the store was read once, so that a node that was down does not
// announce a KEK that the others have left. It returns at once if the node is the only
// one, and otherwise when the store refuses connections, or after a few seconds: the
// store's API may wait for this node.
func (r *Replica) Look(ctx context.Context) {
	k, err := r.cfg.Unlocker.Keyring()
	if err != nil || len(k.Nodes()) < 2 {
		return
	}
	ctx, cancel := context.WithDeadline(ctx, r.began.Add(lookWithin))
	defer cancel()
	select {
	case <-r.looked:
	case <-ctx.Done():
	}
}

// Removal is the place where a node keeps the keyring that removed it. Once the other
// nodes have a KEK that this node does not know, this node can no longer verify anything
// in the store.
type Removal interface {
	// Load returns the keyring. The error is fs.ErrNotExist if there is none.
	Load(context.Context) ([]byte, store.Version, error)
	Save(ctx context.Context, b []byte, old store.Version) (store.Version, error)
	// Remove deletes the keyring. It is not an error if there is none.
	Remove(context.Context) error
}
