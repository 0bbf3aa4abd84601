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
	busy    mutex
	holder  atomic.Pointer[hold] // of the open connection, if a hold keeps it open
}

// New returns the TPM at addr; timeout bounds each operation, 0 means
// DefaultTimeout. Nothing is opened yet.
func New(addr Address, timeout time.Duration) *Device {
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	return &Device{addr: addr, timeout: timeout, busy: newMutex()}
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
	return d.blame(c, guard(func() error { return f(c) }))
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

// Hold lets the operations of the returned context share one connection, one storage
// root key and one session salted to that key. Making the key takes most of an
// operation's time, and an unlock is three operations. Operations with another context
// may use the TPM in between. The caller calls release at the end.
func (d *Device) Hold(ctx context.Context) (held context.Context, release func()) {
	h := &hold{busy: newMutex(), releaseIn: min(releaseTimeout, d.timeout)}
	h.open = func(ctx context.Context) (*conn, error) {
		c, err := d.connect(ctx)
		if err == nil {
			d.holder.Store(h)
		}
		return c, err
	}
	h.close = func(c *conn) {
		d.holder.CompareAndSwap(h, nil)
		d.disconnect(c)
	}
	return context.WithValue(ctx, holdKey{d}, h), h.release
}

type holdKey struct{ *Device }

func (d *Device) heldBy(ctx context.Context) *hold {
	h, _ := ctx.Value(holdKey{d}).(*hold)
	return h
}

// connect waits until no other operation runs, opens the TPM, and flushes the objects and
// sessions that a killed client left in it.
func (d *Device) connect(ctx context.Context) (*conn, error) {
	if h := d.holder.Load(); h != nil {
		h.giveWay(ctx)
	}
	if err := d.busy.lock(ctx); err != nil {
		return nil, err
	}
	s, err := open(ctx, d.addr)
	if err != nil {
		d.busy.unlock()
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
	d.busy.unlock()
}

func (d *Device) unavailable(err error) error {
	return seal.Errorf(seal.CauseUnavailable, hintFor(d.addr, err), "TPM %s: %w", d.addr, err)
}

// blame turns an error of the stream, or an unreadable response, into a fault of the
// device.
func (d *Device) blame(c *conn, err error) error {
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

func hintFor(a Address, err error) string {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "see whether another program holds the TPM; a running kleidi serve tries again by itself"
	case a.network == "device":
		return "check that the firmware has the TPM switched on, that its driver is loaded (ls /dev/tpm*), and that tpm.device names it; a running kleidi serve tries again by itself"
	default:
		return "check that swtpm runs and that tpm.device names its socket; a running kleidi serve tries again by itself"
	}
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
		return &seal.Error{Cause: seal.CauseUnavailable, Err: fmt.Errorf("the TPM refused: %w", err), Hint: "a running kleidi serve tries again by itself; see the TPM's state with tpm2_getcap properties-variable"}
	default:
		return &seal.Error{Cause: seal.CauseUnavailable, Err: fmt.Errorf("the TPM's answer makes no sense: %w", err), Hint: "a running kleidi serve tries again by itself; if it stays so, the TPM or what stands before it is faulty"}
	}
}
