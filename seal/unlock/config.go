package unlock

import (
	"context"
	"log/slog"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

// Store keeps bytes, and replaces them by compare-and-swap; see package store.
type Store interface {
	Load(context.Context) ([]byte, store.Version, error)
	Save(ctx context.Context, b []byte, old store.Version) (store.Version, error)
}

// Anchor keeps the anchor of this node.
type Anchor interface {
	// Load returns the anchor, or nil if there is none.
	Load(context.Context) (*keyring.Anchor, error)
	// Save replaces the anchor durably.
	Save(context.Context, keyring.Anchor) error
	// Replace replaces the anchor even if the present one is damaged, because an
	// operator has vouched for the keyring.
	Replace(context.Context, keyring.Anchor) error
}

// Gate decides whether slots may be opened.
type Gate interface {
	// Attest verifies fresh evidence of how this machine booted. An error shuts the gate.
	Attest(ctx context.Context, slots []seal.Slot) error
	// Explain adds to a refusal what has changed in the boot.
	Explain(error) error
}

// Overruled is a refusal of the gate that still lets some slots be tried: the slots of
// a suspension, which the TPM itself limits.
type Overruled interface {
	error
	// Overrules reports whether the slot may be tried.
	Overrules(seal.Slot) bool
}

// Witness compares the slots of the keyring with those that this node's commands made.
type Witness interface {
	// Opened is told of a keyring that was read from the store, before it is announced.
	Opened(context.Context, *keyring.Keyring)
	// Changing is told of a change before it is saved. If Changing fails, nothing is saved.
	Changing(context.Context, SlotChange) error
	// Changed is told that this change is saved and announced.
	Changed(context.Context)
}

// SlotChange is a change of the keyring by this process.
type SlotChange struct {
	// Before is the keyring before the change. A Witness may or may not know its slots.
	Before, After *keyring.Keyring
	// Elsewhere says that another node made the change, and this node follows.
	Elsewhere bool
}

// Config configures an Unlocker.
type Config struct {
	Store  Store
	Anchor Anchor
	// Ready, if set, must succeed before a KEK is opened, whatever the gate says.
	Ready func() error
	// Gate may be nil on a machine without a TPM.
	Gate Gate
	// Ungated reports whether a wrapper of this type may open slots although the gate
	// refuses. If Ungated is nil, none may.
	Ungated func(kind string) bool
	// Wrappers may open slots, in this order.
	Wrappers []seal.Wrapper
	// Hold, if set, lets all work within the returned context share what it opens,
	// until release is called. It is called for each attempt.
	Hold func(context.Context) (held context.Context, release func())
	// Settle, if set, ends the epochs before the epoch of these slots. It is called
	// after every save and after every opening.
	Settle func(context.Context, []seal.Slot) error
	// Commit, if set, puts a new revision of a keyring that all nodes share into the
	// cluster store, in the place of old. Change calls it before it saves the revision,
	// and saves nothing if it fails.
	Commit func(ctx context.Context, old, next *keyring.Keyring) error
	// WrapStaged, if set, returns slots for the staged KEK of k, like the own slots of
	// the current one. Change calls it when it replaces the own slots of the current KEK,
	// so that the node can also start once the staged KEK is current.
	WrapStaged func(ctx context.Context, k *keyring.Keyring, kek *seal.Secret) ([]seal.Slot, error)
	// Witness may be nil.
	Witness Witness
	Log     *slog.Logger
	// Attempted, if set, is called after each attempt with the cause of its failure, or
	// with "".
	Attempted func(seal.Cause, Timing)
}

// Opener says how a keyring was opened.
type Opener struct {
	// Wrapper is the type of the wrapper that opened a slot.
	Wrapper string
	// Fallback says why the wrappers before it in the order did not. It is nil if
	// Wrapper is the first one.
	Fallback error
	// Staged says why the staged KEK is not open. It is nil if that KEK is open, or if
	// no KEK is staged.
	Staged error
}

// Timing is how long the steps of an attempt took.
type Timing struct {
	Load, Gate, Slots, Total time.Duration
}
