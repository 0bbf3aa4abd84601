package device

import (
	"context"
	"fmt"
)

// mutex is a lock that a context can stop waiting for. While it is free it holds one token.
type mutex chan struct{}

func newMutex() mutex {
	m := make(mutex, 1)
	m.unlock()
	return m
}

// lock waits for the operation that holds the lock.
func (m mutex) lock(ctx context.Context) error {
	select {
	case <-m:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for an earlier TPM operation: %w", context.Cause(ctx))
	}
}

func (m mutex) tryLock() bool {
	select {
	case <-m:
		return true
	default:
		return false
	}
}

func (m mutex) unlock() { m <- struct{}{} }
