//go:build !cgo

package hsm

import (
	"context"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// Without cgo no module can be loaded. New fails, so these methods are never called.

const haveCgo = false

// Settle has nothing to wait for.
func Settle(context.Context) {}

type module struct{}

func moduleAt(string) *module { return nil }

func (w *Wrapper) seal(_ context.Context, kek *seal.Secret, _ *keyslot.Data) (*keyslot.Data, error) {
	_ = kek.Close()
	return nil, ErrNoCgo
}

func (w *Wrapper) open(context.Context, *keyslot.Data) (*seal.Secret, error) { return nil, ErrNoCgo }
func (w *Wrapper) generate(context.Context) (Key, error)                     { return Key{}, ErrNoCgo }
func (w *Wrapper) findKey(context.Context) (Key, error)                      { return Key{}, ErrNoCgo }
func (w *Wrapper) readPIN(context.Context) (PIN, error)                      { return PIN{}, ErrNoCgo }
