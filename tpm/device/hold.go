package device

import (
	"context"
	"time"
)

// holdIdle is how long a held connection stays open between two operations. So a slow
// token or server between them does not keep other processes from the TPM.
const holdIdle = 2 * time.Second

// releaseTimeout bounds the flushing at the end of a held connection. A hanging TPM
// gets no more time than that.
const releaseTimeout = 5 * time.Second

// hold is a connection that several operations share. The first operation opens it. The
// next one opens it again after it was idle or broke.
type hold struct {
	open      func(context.Context) (*conn, error)
	close     func(*conn)
	releaseIn time.Duration // bounds the flushing before close

	busy  mutex       // guards the members below
	conn  *conn       // nil if none is open
	idle  *time.Timer // closes conn
	ended bool
}

// enter returns the connection for one operation, or nil if the hold has ended.
func (h *hold) enter(ctx context.Context) (*conn, func(), error) {
	if err := h.busy.lock(ctx); err != nil {
		return nil, nil, err
	}
	if err := h.connect(ctx); err != nil || h.conn == nil {
		h.busy.unlock()
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
	if h.conn, err = h.open(ctx); err == nil {
		h.conn.held = true
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
	h.busy.unlock()
}

// rest closes the connection unless another operation has begun.
func (h *hold) rest() {
	if h.busy.tryLock() {
		h.disconnect()
		h.busy.unlock()
	}
}

// giveWay closes the connection, after its operation if one is running.
func (h *hold) giveWay(ctx context.Context) {
	if h.busy.lock(ctx) == nil {
		h.disconnect()
		h.busy.unlock()
	}
}

func (h *hold) release() {
	_ = h.busy.lock(context.Background()) // it waits as long as it takes
	h.ended = true
	h.disconnect()
	h.busy.unlock()
}

// disconnect flushes what the connection loaded and closes it.
func (h *hold) disconnect() {
	if h.conn == nil {
		return
	}
	if h.idle != nil {
		h.idle.Stop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), h.releaseIn)
	defer cancel()
	if h.conn.kept != nil && h.conn.broken == nil && h.conn.bind(ctx) == nil {
		_ = guard(func() error { h.conn.kept.Release(h.conn); return nil })
	}
	h.close(h.conn)
	h.conn = nil
}
