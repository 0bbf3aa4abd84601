//go:build cgo

package cryptoki

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestSettle: Settle returns when the running call has ended, or at its context's deadline.
func TestSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := At("/no/module.so")
		t.Cleanup(func() {
			loaded.Lock()
			defer loaded.Unlock()
			delete(loaded.modules, m.path)
		})
		m.lock <- struct{}{} // a call runs
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		Settle(ctx)
		if took := time.Since(start); took != time.Second {
			t.Errorf("Settle gave up after %v, want 1s", took)
		}
		settled := make(chan struct{})
		go func() {
			defer close(settled)
			Settle(t.Context())
		}()
		synctest.Wait()
		select {
		case <-settled:
			t.Error("Settle returned while a call ran")
		default:
		}
		<-m.lock // the call ends
		<-settled
		if len(m.lock) > 0 {
			t.Error("Settle keeps the module")
		}
	})
}
