package device

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
)

// DefaultTimeout bounds one operation (all commands of one Do). A discrete TPM may need
// some seconds for an RSA key; a hanging TPM must not hang kleidi.
const DefaultTimeout = 30 * time.Second

// Device is one TPM. It is open only during an operation, or during a few operations in
// a row (see Hold), and runs one operation at a time. A second client of a swtpm would
// hang, and without a resource manager all clients of a TPM share its handles.
type Device struct {
	addr    Address
	timeout time.Duration
	turn    chan struct{} // holds one token; a mutex that a context can end
	holder  atomic.Pointer[hold]
}

// New returns the TPM at addr; timeout bounds each operation, 0 means
// DefaultTimeout. Nothing is opened yet.
func New(addr Address, timeout time.Duration) *Device {
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	d := &Device{addr: addr, timeout: timeout, turn: make(chan struct{}, 1)}
	d.turn <- struct{}{}
	return d
}

// Do opens the TPM, runs f and closes the TPM. Commands are retried on TPM_RC_RETRY,
// YIELDED, TESTING and NV_RATE until the deadline. An error of the TPM itself is
// returned as f returned it. If the TPM can't be reached, hangs or answers garbage, the
// error is a [*seal.Error] with [seal.CauseUnavailable].
func (d *Device) Do(ctx context.Context, f func(t transport.TPM) error) (err error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	c, leave, err := d.enter(ctx)
	if err != nil {
		return d.unavailable(err)
	}
	defer leave()
	return c.blame(d, guard(func() error { return f(c) }))
}

// enter opens the TPM for an operation, or takes the connection that ctx holds, see
// [Device.Hold]. The caller calls leave when the operation has ended.
func (d *Device) enter(ctx context.Context) (c *conn, leave func(), err error) {
	if h := d.heldBy(ctx); h != nil {
		if c, leave, err = h.enter(ctx); c != nil || err != nil {
			return c, leave, err
		}
	}
	if c, err = d.connect(ctx); err != nil {
		return nil, nil, err
	}
	return c, func() { d.disconnect(c) }, nil
}

// connect waits for the device's turn, opens the TPM, and flushes the objects and
// sessions that a killed client left in it.
func (d *Device) connect(ctx context.Context) (*conn, error) {
	if h := d.holder.Load(); h != nil {
		h.giveWay(ctx)
	}
	select {
	case <-d.turn:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for an earlier TPM operation: %w", context.Cause(ctx))
	}
	s, err := open(ctx, d.addr)
	if err != nil {
		d.turn <- struct{}{}
		return nil, err
	}
	c := &conn{ctx: ctx, stream: s}
	if !d.addr.managed() {
		if err := guard(func() error { return flushStale(c) }); err != nil {
			d.disconnect(c)
			return nil, fmt.Errorf("flush what an ended client left: %w", err)
		}
	}
	return c, nil
}

func (d *Device) disconnect(c *conn) {
	c.close()
	d.turn <- struct{}{}
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

func (d *Device) unavailable(err error) error {
	return seal.Errorf(seal.CauseUnavailable, hintFor(d.addr, err), "TPM %s: %w", d.addr, err)
}

func hintFor(a Address, err error) string {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "see whether another program holds the TPM; kleidi serve tries again"
	case a.network == "device":
		return "check that the firmware has the TPM switched on, that its driver is loaded (ls /dev/tpm*), and that tpm.device names it; kleidi serve tries again"
	default:
		return "check that swtpm runs and that tpm.device names its socket; kleidi serve tries again"
	}
}

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

// blame turns an error of the stream, or an unreadable response, into a fault of the
// device.
func (c *conn) blame(d *Device, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*panicError](err); ok {
		c.broken = err
		return d.unavailable(err)
	}
	if c.broken != nil && seal.CauseOf(err) == "" {
		return d.unavailable(err)
	}
	return err
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

// IsTPMError reports whether the TPM itself answered with a response code.
func IsTPMError(err error) bool {
	_, ok := errors.AsType[tpm2.TPMRC](err)
	return ok
}

// Classify gives an error of the TPM its cause, unless it has one.
func Classify(err error) error {
	switch {
	case err == nil, seal.CauseOf(err) != "":
		return err
	case errors.Is(err, tpm2.TPMRCLockout):
		return &seal.Error{Cause: seal.CauseLockout, Err: fmt.Errorf("the TPM is in dictionary-attack lockout: %w", err),
			Hint: "wait for it to end, or clear it with tpm2_dictionarylockout --clear-lockout"}
	case IsTPMError(err):
		return &seal.Error{Cause: seal.CauseUnavailable, Err: fmt.Errorf("the TPM refused: %w", err), Hint: "kleidi serve tries again; see the TPM's state with tpm2_getcap properties-variable"}
	default:
		return &seal.Error{Cause: seal.CauseUnavailable, Err: fmt.Errorf("the TPM's answer makes no sense: %w", err), Hint: "kleidi serve tries again; if it stays so, the TPM or what stands before it is faulty"}
	}
}
