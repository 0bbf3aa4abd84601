//go:build cgo

package cryptoki

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/seal"
)

// Module is a PKCS#11 module of this process.
type Module struct {
	path string
	// lock holds an element while a call runs. It is a channel because a caller gives
	// up waiting when its context ends.
	lock    chan struct{}
	started atomic.Pointer[time.Time] // when the running call, or else the last one, started
	// Functions is nil until the module is loaded.
	Functions Functions
	pins      pinRecord
}

// NewModule returns a module that is not one of [At]. If p is nil, the module is loaded
// from its path by the first call.
func NewModule(path string, p Functions) *Module {
	return &Module{path: path, lock: make(chan struct{}, 1), Functions: p, pins: newPINRecord()}
}

// loaded holds the modules of the process. It is a global because a module is one:
// dlopen returns the same library to every caller, and C_Initialize, C_Login and
// C_Finalize act on the whole process.
var loaded = struct {
	sync.Mutex
	modules map[string]*Module
}{modules: map[string]*Module{}}

// At returns the module at a path. It need not be loaded, and need not exist.
func At(path string) *Module {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	loaded.Lock()
	defer loaded.Unlock()
	m := loaded.modules[path]
	if m == nil {
		m = NewModule(path, nil)
		loaded.modules[path] = m
	}
	return m
}

// Settle waits until no call into a module of this process runs, or until ctx ends. A token in
// software writes its files during a call, such as the login, and a process that ends
// meanwhile leaves a token that no later process can read.
func Settle(ctx context.Context) {
	loaded.Lock()
	modules := slices.Collect(maps.Values(loaded.modules))
	loaded.Unlock()
	for _, m := range modules {
		select {
		case m.lock <- struct{}{}:
			<-m.lock
		case <-ctx.Done():
			return
		}
	}
}

// Call is one operation on a module.
type Call[T any] struct {
	Run     func() (T, error)
	Discard func(T) // gets the result of Run if nobody waits for it any more; may be nil
	Cleanup func()  // called exactly once, when Run has ended or will not start; may be nil
}

func (c *Call[T]) drop(result T) {
	if c.Discard != nil {
		c.Discard(result)
	}
}

// End calls Cleanup.
func (c *Call[T]) End() {
	if c.Cleanup != nil {
		c.Cleanup()
	}
}

// Do initialises the module and runs c, while no other call runs. If the session is
// lost, Do runs c once more, from the start. If ctx ends before c does, Do returns. The
// call goes on, because a call into a module can't be cancelled, and other calls wait
// for it.
func Do[T any](ctx context.Context, m *Module, initArgs string, c Call[T]) (T, error) {
	var none T
	select {
	case m.lock <- struct{}{}:
	case <-ctx.Done():
		c.End()
		return none, m.busy(ctx)
	}
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	var settled atomic.Bool // whether the result is delivered, or the caller has given up
	start := time.Now()
	m.started.Store(&start)
	go func() {
		defer func() { <-m.lock }()
		defer c.End()
		var value T
		var err error
		scrubbed(func() {
			value, err = initialised(m, initArgs, c.Run)
			if IsLost(err) && ctx.Err() == nil {
				value, err = initialised(m, initArgs, c.Run)
			}
		})
		if settled.CompareAndSwap(false, true) {
			done <- result{value, err}
		} else if err == nil {
			c.drop(value)
		}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		if !settled.CompareAndSwap(false, true) {
			r := <-done
			return r.value, r.err
		}
		return none, m.hangs(ctx)
	}
}

// initialised runs f between C_Initialize and C_Finalize.
func initialised[T any](m *Module, initArgs string, f func() (T, error)) (T, error) {
	var none T
	if err := m.load(); err != nil {
		return none, err
	}
	finalize, err := m.initialize(initArgs)
	if err != nil {
		return none, err
	}
	defer finalize()
	return f()
}

// load loads the module if it is not loaded yet.
func (m *Module) load() error {
	if m.Functions != nil {
		return nil
	}
	if err := checkModuleFile(m.path); err != nil {
		return m.bad(err)
	}
	p, err := load(m.path)
	if err != nil {
		return m.bad(fmt.Errorf("%.300w", err))
	}
	m.Functions = p
	return nil
}

// checkModuleFile demands a regular file that only root and this user may change or
// replace. The code in it runs as this user.
func checkModuleFile(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("it is not a regular file")
	}
	return ownership.CheckFile(path)
}

func (m *Module) bad(err error) error {
	return seal.Caused(seal.CauseUnavailable, "name the PKCS#11 module of your token's vendor with pkcs11.module, and have its package installed",
		"load the PKCS#11 module "+m.path, err)
}

// initialize calls C_Initialize, and returns a function that undoes it. If somebody else
// in this process has initialised the module, that function does not finalise it.
func (m *Module) initialize(initArgs string) (finalize func(), err error) {
	args, free := cString(initArgs)
	for _, flags := range []uint{pkcs11.CKF_OS_LOCKING_OK, 0} {
		err = m.Functions.Initialize(pkcs11.InitializeWithFlags(flags), pkcs11.InitializeWithReserved(args))
		if !errors.Is(err, pkcs11.Error(pkcs11.CKR_CANT_LOCK)) {
			break // only one call runs at a time, so a module without locks will do
		}
	}
	switch {
	case errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)):
		return free, nil
	case err != nil:
		free()
		return nil, seal.Errorf(seal.CauseUnavailable, "see whether the module's own configuration exists and is readable (SOFTHSM2_CONF for SoftHSM, initArgs for NSS)",
			"C_Initialize of %s: %w", m.path, err)
	}
	return func() {
		_ = m.Functions.Finalize() // the work is done; the next call shows whether the module works
		free()
	}, nil
}

// busy is the error of a call that did not start before ctx ended.
func (m *Module) busy(ctx context.Context) error {
	started := "just now"
	if t := m.started.Load(); t != nil {
		started = t.Format(time.TimeOnly)
	}
	return seal.Errorf(seal.CauseUnavailable, "see whether the token's device or service hangs; if it does not recover by itself, repair it and restart kleidi",
		"the PKCS#11 module %s is busy with a call made at %s: %w", m.path, started, context.Cause(ctx))
}

// hangs is the error of a call that did not end before ctx did.
func (m *Module) hangs(ctx context.Context) error {
	return seal.Errorf(seal.CauseUnavailable, "see whether the token's device or service hangs; raise pkcs11.timeout if it is only slow",
		"the PKCS#11 module %s did not answer: %w", m.path, context.Cause(ctx))
}

// sessionLost are the answers if a session, token or key went away during a call.
var sessionLost = []pkcs11.Error{
	pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT,
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_DEVICE_ERROR,
	pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OPERATION_NOT_INITIALIZED, pkcs11.CKR_OPERATION_ACTIVE,
}

// IsLost reports whether err says that a session was lost, so that the call is repeated
// in a new one.
func IsLost(err error) bool {
	code, ok := errors.AsType[pkcs11.Error](err)
	return ok && slices.Contains(sessionLost, code)
}
