package slotrecord

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"

	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// File is where the record is kept.
type File interface {
	// Load reads the file. The error is fs.ErrNotExist if there is none.
	Load(context.Context) ([]byte, store.Version, error)
	// Save replaces the version old of the file.
	Save(ctx context.Context, b []byte, old store.Version) (store.Version, error)
}

// Record is the record of one node. It implements [unlock.Witness].
type Record struct {
	file File
	view slotview.Reader
	log  *slog.Logger

	mu     sync.Mutex
	loaded bool
	record content // of no cluster if there is none
	dirty  bool    // the file is older than record
}

// New returns the record that file holds, or will hold. It reads nothing yet.
func New(file File, view slotview.Reader, log *slog.Logger) *Record {
	return &Record{file: file, view: view, log: log}
}

// content is the content of the file.
type content struct {
	Version   int            `json:"version"`
	ClusterID string         `json:"clusterID"`
	Slots     []slotview.Way `json:"slots"`
	// Pending are the ways after a change. The process that makes the change may die
	// before or after it saves the keyring.
	Pending []slotview.Way `json:"pending,omitempty"`
}

// formatVersion is the only version so far.
const formatVersion = 1

// OutsideChange is how the ways into a keyring differ from those on record.
type OutsideChange struct{ Added, Removed []slotview.Way }

// None reports whether nothing differs.
func (c OutsideChange) None() bool { return len(c.Added)+len(c.Removed) == 0 }

// Describe lists the differences for an operator.
func (c OutsideChange) Describe() (all []string) {
	for _, w := range c.Added {
		all = append(all, "added "+w.Slot)
	}
	for _, w := range c.Removed {
		all = append(all, "removed "+w.Slot)
	}
	return all
}

// IDs returns the IDs of the ways that differ.
func (c OutsideChange) IDs() (ids []string) {
	for _, w := range slotview.WithWays(c.Added, c.Removed) {
		ids = append(ids, w.ID)
	}
	return ids
}

// Outside returns how these slots differ from those on record. Without a record, nothing
// differs.
func (r *Record) Outside(ctx context.Context, cluster string, slots []seal.Slot) OutsideChange {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.load(ctx, cluster)
	if r.record.ClusterID != cluster {
		return OutsideChange{}
	}
	return r.record.outside(r.view.Ways(slots))
}

func (c content) outside(ways []slotview.Way) OutsideChange {
	return OutsideChange{
		Added:   slotview.WithoutWays(slotview.WithoutWays(ways, c.Slots), c.Pending),
		Removed: slotview.WithoutWays(c.certain(), ways),
	}
}

// certain returns the ways on record, whether a pending change was saved or not.
func (c content) certain() []slotview.Way {
	if c.Pending == nil {
		return c.Slots
	}
	return slotview.WithoutWays(c.Slots, slotview.WithoutWays(c.Slots, c.Pending))
}

// known returns the ways on record, for a keyring with these ways.
func (c content) known(ways []slotview.Way) []slotview.Way {
	there := slotview.WithoutWays(ways, c.outside(ways).Added)
	return slotview.WithWays(there, c.certain())
}

// Confirm makes the record accept these slots as they are, with the next change.
func (r *Record) Confirm(k *keyring.Keyring) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.record, r.loaded, r.dirty = r.first(k), true, true
}

func (r *Record) first(k *keyring.Keyring) content {
	return content{Version: formatVersion, ClusterID: k.ClusterID().String(), Slots: r.view.Ways(k.Slots())}
}

// Begin records the slots of a keyring that was just made.
func (r *Record) Begin(ctx context.Context, k *keyring.Keyring) error {
	r.Confirm(k)
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.save(ctx)
}

// Opened implements [unlock.Witness].
func (r *Record) Opened(ctx context.Context, k *keyring.Keyring) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.load(ctx, k.ClusterID().String())
	if r.record.ClusterID != k.ClusterID().String() { // an earlier version kept none, or somebody deleted it
		r.record = r.first(k)
		r.log.Warn("there was no record of the slots, so the slots in the keyring are accepted as they are; compare them with kleidi slot list", "slots", slotview.DescribeWays(r.record.Slots))
		_ = r.save(ctx) // on a read-only disk, serve still remembers it
		return
	}
	ways := r.view.Ways(k.Slots())
	c := r.record.outside(ways)
	if c.None() && r.record.Pending != nil { // the process that made the change died before the end
		r.record.Slots, r.record.Pending = ways, nil
		_ = r.save(ctx)
	}
	if c.None() {
		return
	}
	_ = r.save(ctx) // a person who changed the keyring may have changed the record too
	r.log.Warn("the keyring was changed from outside", "added", slotview.DescribeWays(c.Added), "removed", slotview.DescribeWays(c.Removed))
}

// Changing implements [unlock.Witness].
func (r *Record) Changing(ctx context.Context, change unlock.SlotChange) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.load(ctx, change.After.ClusterID().String())
	before, after := r.view.Ways(change.Before.Slots()), r.view.Ways(change.After.Slots())
	made := OutsideChange{Added: slotview.WithoutWays(after, before), Removed: slotview.WithoutWays(before, after)}
	if change.Elsewhere && !made.None() {
		r.log.Warn("another node has changed the slots", "added", slotview.DescribeWays(made.Added), "removed", slotview.DescribeWays(made.Removed))
	}
	if cluster := change.After.ClusterID().String(); r.record.ClusterID != cluster {
		r.record = content{Version: formatVersion, ClusterID: cluster, Slots: before}
	}
	known := r.record.known(before)
	next := slotview.WithWays(slotview.WithoutWays(known, made.Removed), made.Added)
	same := len(slotview.WithoutWays(known, next))+len(slotview.WithoutWays(next, known)) == 0
	if same && r.record.Pending == nil && !r.dirty {
		return nil
	}
	r.record.Slots, r.record.Pending = known, nil
	if !same {
		r.record.Pending = next
	}
	if err := r.save(ctx); err != nil {
		return seal.Errorf(seal.CauseStore, "see the state folder's disk and permissions", "the record of the slots: %w", err)
	}
	return nil
}

// Changed implements [unlock.Witness].
func (r *Record) Changed(ctx context.Context) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.record.Pending == nil {
		return
	}
	r.record.Slots, r.record.Pending = r.record.Pending, nil
	if err := r.save(ctx); err != nil { // the pending change on disk says the same
		r.log.Warn("the record of the slots can't be written", "error", err)
	}
}

// load reads the file once. Without a file, or with one of another cluster, there is no
// record. A file that can't be read is a record without any slot.
func (r *Record) load(ctx context.Context, cluster string) {
	if r.loaded {
		return
	}
	b, _, err := r.file.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err == nil {
		err = json.Unmarshal(b, &r.record)
	}
	if err == nil && r.record.Version != formatVersion {
		err = fmt.Errorf("version %d is not %d", r.record.Version, formatVersion)
	}
	if err != nil {
		r.log.Warn("the record of the slots can't be read, so none of them is known", "error", err)
		r.record = content{Version: formatVersion, ClusterID: cluster}
	}
	r.loaded = true
}

func (r *Record) save(ctx context.Context) error {
	r.dirty, r.loaded = true, true
	b, err := json.Marshal(r.record)
	if err != nil {
		return err
	}
	_, version, err := r.file.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		version, err = "", nil
	}
	if err == nil {
		_, err = r.file.Save(ctx, append(b, '\n'), version)
	}
	r.dirty = err != nil
	return err
}
