//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/seal"
)

// module is a PKCS#11 module of this process.
type module struct {
	path  string
	turn  chan struct{}             // whoever has put something in may call it
	since atomic.Pointer[time.Time] // since when the present turn lasts
	p     cryptoki                  // nil until it is loaded
	tried tried                     // PINs that are not given again
}

func newModule(path string, p cryptoki) *module {
	return &module{path: path, turn: make(chan struct{}, 1), p: p, tried: tried{by: map[tokenName]map[pinMark]pkcs11.Error{}, right: map[tokenName]pinMark{}}}
}

// loaded holds the modules of the process. This is a global because what it
// describes is one: dlopen returns the same library to whoever asks, and
// C_Initialize, C_Login and C_Finalize act on the whole process.
var loaded = struct {
	sync.Mutex
	modules map[string]*module
}{modules: map[string]*module{}}

// moduleAt returns the module at a path, which need not be loaded or exist yet.
func moduleAt(path string) *module {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	loaded.Lock()
	defer loaded.Unlock()
	m := loaded.modules[path]
	if m == nil {
		m = newModule(path, nil)
		loaded.modules[path] = m
	}
	return m
}

// do calls f while the module is initialised, as the only caller, and returns what
// it returns. Where the session was lost, it does so once more from the start. When ctx ends first, do returns, but a call into a module can't be
// cancelled: it goes on, and until it returns nobody else gets a turn. Then drop
// is called with what f returned. end is called once in any case, when f no longer runs.
func do[T any](ctx context.Context, m *module, initArgs string, f func() (T, error), drop func(T), end func()) (T, error) {
	var none T
	select {
	case m.turn <- struct{}{}:
	case <-ctx.Done():
		end()
		return none, m.busy(ctx)
	}
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	var delivered atomic.Bool // set by the first of the two who no longer wait for the other
	start := time.Now()
	m.since.Store(&start)
	go func() {
		defer func() { <-m.turn }()
		defer end()
		var value T
		var err error
		discreet(func() {
			value, err = initialised(m, initArgs, f)
			if isLost(err) && ctx.Err() == nil {
				value, err = initialised(m, initArgs, f)
			}
		})
		if delivered.CompareAndSwap(false, true) {
			done <- result{value, err}
		} else if err == nil {
			drop(value)
		}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		if !delivered.CompareAndSwap(false, true) {
			r := <-done
			return r.value, r.err
		}
		return none, m.hangs(ctx)
	}
}

// initialised runs f between C_Initialize and C_Finalize.
func initialised[T any](m *module, initArgs string, f func() (T, error)) (T, error) {
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

// load loads the module unless it is loaded.
func (m *module) load() error {
	if m.p != nil {
		return nil
	}
	info, err := os.Stat(m.path)
	switch {
	case err != nil:
		return m.bad(err)
	}
	if err := checkModuleFile(info); err != nil {
		return m.bad(err)
	}
	p, err := load(m.path)
	if err != nil {
		return m.bad(err)
	}
	m.p = p
	return nil
}

// checkModuleFile demands a regular file that nobody but root and this user may
// change: what it holds is run as this user.
func checkModuleFile(info fs.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	mode := info.Mode().Perm()
	switch {
	case !info.Mode().IsRegular():
		return errors.New("it is no regular file")
	case mode&0o002 != 0:
		return fmt.Errorf("its mode is %04o: anyone may write it, and it would run as this user; have root own it with mode 0644", mode)
	case !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return errors.New("it belongs to another user than root and the one that runs kleidi, as which it would run; have root own it with mode 0644")
	case mode&0o020 != 0 && st.Gid != 0:
		return fmt.Errorf("its mode is %04o: its group %d may write it, and it would run as this user; have root own it with mode 0644", mode, st.Gid)
	}
	return nil
}

func (m *module) bad(err error) error {
	return seal.Errorf(seal.CauseUnavailable, "name the PKCS#11 module of your token's vendor with pkcs11.module, and have its package installed",
		"load the PKCS#11 module %s: %.300w", m.path, err)
}

// initialize calls C_Initialize; what it returns undoes that. Where somebody else
// in this process has initialised the module, it is theirs to finalise.
func (m *module) initialize(initArgs string) (finalize func(), err error) {
	args, free := cString(initArgs)
	for _, flags := range []uint{pkcs11.CKF_OS_LOCKING_OK, 0} {
		err = m.p.Initialize(pkcs11.InitializeWithFlags(flags), pkcs11.InitializeWithReserved(args))
		if !errors.Is(err, pkcs11.Error(pkcs11.CKR_CANT_LOCK)) {
			break // all calls take turns: a module without locks will do
		}
	}
	switch {
	case errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)):
		return free, nil
	case err != nil:
		free()
		return nil, seal.Errorf(seal.CauseUnavailable, "see whether the module's own configuration is there and readable (SOFTHSM2_CONF for SoftHSM, initArgs for NSS)",
			"C_Initialize of %s: %w", m.path, err)
	}
	return func() {
		_ = m.p.Finalize() // the work is done; the next turn tells whether the module is well
		free()
	}, nil
}

// busy and hangs say why ctx ended before the module answered.
func (m *module) busy(ctx context.Context) error {
	since := "just now"
	if t := m.since.Load(); t != nil {
		since = t.Format(time.TimeOnly)
	}
	return seal.Errorf(seal.CauseUnavailable, "see whether the token's device or service hangs; if it does not come back by itself, mend it and restart kleidi",
		"the PKCS#11 module %s is busy with a call made at %s: %w", m.path, since, context.Cause(ctx))
}

func (m *module) hangs(ctx context.Context) error {
	return seal.Errorf(seal.CauseUnavailable, "see whether the token's device or service hangs; raise pkcs11.timeout if it is only slow",
		"the PKCS#11 module %s did not answer: %w", m.path, context.Cause(ctx))
}

// errTimeout is why a context of [Wrapper] ended where its caller's did not.
func errTimeout(d time.Duration) error {
	return fmt.Errorf("%w: no answer within %s", context.DeadlineExceeded, d)
}
