//go:build !cgo

package hsm

import (
	"context"

	"github.com/beezy-dev/kleidi/seal"
)

// Without cgo no module can be loaded. New fails, so these methods are never called.

const haveCgo = false

type module struct{}

func moduleAt(string) *module { return nil }

func (w *Wrapper) seal(_ context.Context, kek *seal.Secret, _ *slotData) (*slotData, error) {
	_ = kek.Close()
	return nil, ErrNoCgo
}

func (w *Wrapper) open(context.Context, *slotData) (*seal.Secret, error) { return nil, ErrNoCgo }
func (w *Wrapper) generate(context.Context) (Key, error)                 { return Key{}, ErrNoCgo }
func (w *Wrapper) findKey(context.Context) (Key, error)                  { return Key{}, ErrNoCgo }
