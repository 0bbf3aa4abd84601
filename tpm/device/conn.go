package device

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// conn is one open TPM and one operation's transport.TPM.
type conn struct {
	ctx    context.Context
	stream stream
	last   []byte // the last response handed out; cleared when nobody needs it any more
	broken error  // the first fault of the stream; nothing is sent after it
	held   bool   // for several operations, which share kept
	kept   Kept   // nil if they share nothing yet
}

// Kept is what the operations of a held connection share.
type Kept interface {
	// Release frees it in the TPM, before the connection is closed.
	Release(transport.TPM)
}

// Held returns the place for what the operations of a held connection share, or nil if
// t is not one, see [Device.Hold].
func Held(t transport.TPM) *Kept {
	if c, ok := t.(*conn); ok && c.held {
		return &c.kept
	}
	return nil
}

// bind ties an open connection to the context of another operation.
func (c *conn) bind(ctx context.Context) error {
	err := c.stream.bind(ctx)
	if err == nil {
		c.ctx = ctx
	}
	return err
}

// unbind ends an operation on a connection that stays open.
func (c *conn) unbind() {
	clear(c.last)
	c.last = nil
	if err := c.bind(context.WithoutCancel(c.ctx)); err != nil && c.broken == nil {
		c.broken = err
	}
}

func (c *conn) close() {
	clear(c.last)
	_ = c.stream.Close()
}

// After these response codes the same command is sent again (TPM 2.0 Library, Part 2,
// table 17, warning codes).
var again = map[tpm2.TPMRC]bool{
	tpm2.TPMRCRetry:   true,
	tpm2.TPMRCYielded: true,
	tpm2.TPMRCTesting: true,
	tpm2.TPMRCNVRate:  true,
}

const (
	retryFirst = 5 * time.Millisecond
	retryMost  = 500 * time.Millisecond
)

// Send implements transport.TPM. The response is cleared at the next Send and
// at the end of the operation; go-tpm copies what it unmarshals.
func (c *conn) Send(command []byte) ([]byte, error) {
	clear(c.last)
	c.last = nil
	if c.broken != nil {
		return nil, c.broken
	}
	var busy error // the TPM's last answer
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		response, rc, err := roundTrip(c.ctx, c.stream, command)
		if err != nil {
			if busy != nil && errors.Is(err, context.DeadlineExceeded) {
				err = untilTheDeadline(busy)
			}
			c.broken = err
			return nil, err
		}
		if !again[rc] {
			c.last = response
			return response, nil
		}
		busy = rc
		select {
		case <-time.After(wait):
		case <-c.ctx.Done():
			c.broken = untilTheDeadline(busy)
			return nil, c.broken
		}
	}
}

func untilTheDeadline(rc error) error {
	return fmt.Errorf("the TPM answered %w until the deadline", rc)
}

// flushStale flushes the transient objects and sessions that a killed client
// left in a TPM without resource manager: three of either exhaust a swtpm. Such
// a TPM has one client at a time, so no living client owns them.
func flushStale(t transport.TPM) error {
	for _, first := range []uint32{uint32(tpm2.TPMHTTransient) << 24, uint32(tpm2.TPMHTLoadedSession) << 24} {
		r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(t)
		if err != nil {
			return fmt.Errorf("TPM2_GetCapability: %w", err)
		}
		handles, err := r.CapabilityData.Data.Handles()
		if err != nil {
			return fmt.Errorf("TPM2_GetCapability: %w", err)
		}
		for _, h := range handles.Handle {
			if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(t); err != nil {
				return fmt.Errorf("TPM2_FlushContext: %w", err)
			}
		}
	}
	return nil
}

// guard turns a panic into an error. go-tpm unmarshals responses by reflection, and a
// TPM that answers garbage must not end the process.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = &panicError{p}
		}
	}()
	return f()
}

type panicError struct{ value any }

// Error names only the type: the value could hold parts of the response.
func (e *panicError) Error() string {
	return fmt.Sprintf("the TPM's answer could not be read (%T)", e.value)
}
