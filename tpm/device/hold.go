package device

import (
	"context"
	"fmt"
	"time"
)

// holdIdle is how long a held connection stays open between two operations. So a slow
// token or server between them does not keep other processes from the TPM.
const holdIdle = 2 * time.Second

// releaseTimeout bounds the flushing at the end of a held connection. A hanging TPM
// gets no more time than that.
const releaseTimeout = 5 * time.Second

// Hold lets the operations of the returned context share one connection, one storage
// root key and one session salted to that key. Making the key takes most of an
// operation's time, and an unlock is three operations. Operations with another context
// may use the TPM in between. The caller calls release at the end.
func (d *Device) Hold(ctx context.Context) (held context.Context, release func()) {
	h := &hold{device: d, turn: make(chan struct{}, 1)}
	h.turn <- struct{}{}
	return context.WithValue(ctx, holdKey{d}, h), h.release
}

type holdKey struct{ *Device }

func (d *Device) heldBy(ctx context.Context) *hold {
	h, _ := ctx.Value(holdKey{d}).(*hold)
	return h
}

// hold is a connection that several operations share. The first operation opens it. The
// next one opens it again after it was idle or broke.
type hold struct {
	device *Device
	turn   chan struct{} // as Device.turn; it guards the members below
	conn   *conn         // nil if none is open
	idle   *time.Timer   // closes conn
	ended  bool
}

// enter returns the connection for one operation, or nil if the hold has ended.
func (h *hold) enter(ctx context.Context) (*conn, func(), error) {
	select {
	case <-h.turn:
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("wait for an earlier TPM operation: %w", context.Cause(ctx))
	}
	if err := h.connect(ctx); err != nil || h.conn == nil {
		h.turn <- struct{}{}
		return nil, nil, err
	}
	return h.conn, h.leave, nil
}

func (h *hold) connect(ctx context.Context) (err error) {
	if h.ended {
		return nil
	}
	if h.conn != nil {
		h.idle.Stop()
		if h.conn.bind(ctx) == nil {
			return nil
		}
		h.disconnect()
	}
	if h.conn, err = h.device.connect(ctx); err == nil {
		h.conn.held = true
		h.device.holder.Store(h)
	}
	return err
}

func (h *hold) leave() {
	h.conn.unbind()
	if h.conn.broken != nil {
		h.disconnect()
	} else {
		h.idle = time.AfterFunc(holdIdle, h.rest)
	}
	h.turn <- struct{}{}
}

// rest closes the connection unless another operation has begun.
func (h *hold) rest() {
	select {
	case <-h.turn:
		h.disconnect()
		h.turn <- struct{}{}
	default:
	}
}

// giveWay closes the connection, after its operation if one is running.
func (h *hold) giveWay(ctx context.Context) {
	select {
	case <-h.turn:
		h.disconnect()
		h.turn <- struct{}{}
	case <-ctx.Done():
	}
}

func (h *hold) release() {
	<-h.turn
	h.ended = true
	h.disconnect()
	h.turn <- struct{}{}
}

// disconnect flushes what the connection loaded and closes it.
func (h *hold) disconnect() {
	if h.conn == nil {
		return
	}
	if h.idle != nil {
		h.idle.Stop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), min(releaseTimeout, h.device.timeout))
	defer cancel()
	if h.conn.kept != nil && h.conn.broken == nil && h.conn.bind(ctx) == nil {
		_ = guard(func() error { h.conn.kept.Release(h.conn); return nil })
	}
	h.device.holder.CompareAndSwap(h, nil)
	h.device.disconnect(h.conn)
	h.conn = nil
}
