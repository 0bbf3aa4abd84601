package nv_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

const index = uint32(nv.DefaultEpochIndex)

// bench is a booted machine behind a proxy, and its epoch counter.
type bench struct {
	*testing.T
	machine *tpmtest.Machine
	proxy   *tpmtest.Proxy
	owner   keys.Owner
	counter *nv.Counter
}

func newBench(t *testing.T) *bench {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	b := &bench{T: t, machine: m, proxy: tpmtest.NewProxy(t, m)}
	b.useOwner(keys.Owner{})
	return b
}

func (b *bench) useOwner(o keys.Owner) {
	b.Helper()
	c, err := nv.NewCounter(index, o)
	if err != nil {
		b.Fatal(err)
	}
	b.owner, b.counter = o, c
}

// with runs f with the storage root key.
func (b *bench) with(f func(transport.TPM, *keys.SRK) error) error {
	return b.proxy.TPM(0).Do(b.Context(), func(t transport.TPM) error {
		return keys.WithSRK(t, b.owner, nil, func(srk *keys.SRK) error { return f(t, srk) })
	})
}

// must runs commands that are not part of the test.
func (b *bench) must(f func(transport.TPM) error) {
	b.Helper()
	if err := b.machine.TPM().Do(b.Context(), f); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) value(call func(transport.TPM, *keys.SRK) (uint64, error)) (value uint64, err error) {
	err = b.with(func(t transport.TPM, srk *keys.SRK) (err error) {
		value, err = call(t, srk)
		return err
	})
	return value, err
}

func (b *bench) ensure() uint64 {
	b.Helper()
	v, err := b.value(b.counter.Ensure)
	if err != nil {
		b.Fatalf("Ensure: %v", err)
	}
	return v
}

func (b *bench) raise(to uint64) error {
	return b.with(func(t transport.TPM, srk *keys.SRK) error { return b.counter.RaiseTo(t, srk, to) })
}

// want demands the typed cause, and a hint with a remedy.
func (b *bench) want(err error, cause seal.Cause, parts ...string) {
	b.Helper()
	if got := seal.CauseOf(err); got != cause {
		b.Errorf("%v: cause %q, want %q", err, got, cause)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			b.Errorf("%q does not say %q", err, part)
		}
	}
}

func ownerAuth(value string) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: tpm2.PasswordAuth([]byte(value))}
}

func undefine(t transport.TPM) error { return undefineAt(t, index) }

func undefineAt(t transport.TPM, index uint32) error {
	r, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(t)
	if err != nil {
		return err
	}
	_, err = tpm2.NVUndefineSpace{AuthHandle: ownerAuth(""), NVIndex: tpm2.NamedHandle{Handle: tpm2.TPMHandle(index), Name: r.NVName}}.Execute(t)
	return err
}

func define(t transport.TPM, auth string, public tpm2.TPMSNVPublic) error {
	return defineAt(t, index, auth, public)
}

func defineAt(t transport.TPM, index uint32, auth string, public tpm2.TPMSNVPublic) error {
	public.NVIndex, public.NameAlg = tpm2.TPMHandle(index), tpm2.TPMAlgSHA256
	_, err := tpm2.NVDefineSpace{AuthHandle: ownerAuth(""), Auth: tpm2.TPM2BAuth{Buffer: []byte(auth)}, PublicInfo: tpm2.New2B(public)}.Execute(t)
	return err
}

// counterAttributes are the attributes of the epoch counter.
var counterAttributes = tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTCounter}

func TestNewCounterTakesTheOwnersRangeOnly(t *testing.T) {
	for i, ok := range map[uint32]bool{
		0x0180_0000: true, index: true, 0x01BF_FFFF: true,
		0: false, 0x017F_FFFF: false, 0x01C0_0000: false, 0x01C0_0002: false, 0x8100_0001: false, 0xFFFF_FFFF: false,
	} {
		c, err := nv.NewCounter(i, keys.Owner{})
		if (err == nil) != ok {
			t.Errorf("%#08x: %v", i, err)
		}
		if ok && c.Index() != i {
			t.Errorf("%#08x becomes %#08x", i, c.Index())
		}
	}
}

// TestNameIsTheTPMs: the Name computed in code is that of the index that Ensure makes;
// another index has another Name.
func TestNameIsTheTPMs(t *testing.T) {
	b := newBench(t)
	b.ensure()
	b.must(func(tp transport.TPM) error {
		r, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(tp)
		if err == nil && !bytes.Equal(r.NVName.Buffer, b.counter.Name()) {
			t.Errorf("the TPM has %x, computed %x", r.NVName.Buffer, b.counter.Name())
		}
		return err
	})
	other, err := nv.NewCounter(index+1, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(other.Name(), b.counter.Name()) {
		t.Error("two indices have one Name")
	}
}

func TestEnsureIsIdempotent(t *testing.T) {
	b := newBench(t)
	if _, err := b.value(b.counter.Read); seal.CauseOf(err) != seal.CauseEpoch {
		t.Errorf("Read before Ensure: %v", err)
	}
	first := b.ensure()
	for range 3 {
		if again := b.ensure(); again != first {
			t.Fatalf("Ensure gives %d, then %d", first, again)
		}
	}
	b.machine.Reboot(b.machine.Current())
	if again := b.ensure(); again != first {
		t.Errorf("after a reboot: %d, was %d", again, first)
	}
	if n := b.proxy.Count(tpm2.TPMCCNVIncrement); n != 1 {
		t.Errorf("%d increments", n)
	}
}

// TestEnsureAfterAFault: after a kill between any two of its commands, Ensure makes the
// same counter when it is called again.
func TestEnsureAfterAFault(t *testing.T) {
	clean := newBench(t)
	clean.ensure()
	steps := len(clean.proxy.Traffic())
	for n := range steps {
		b := newBench(t)
		b.proxy.Inject(tpmtest.Fault{After: n, Do: tpmtest.Drop})
		if _, err := b.value(b.counter.Ensure); seal.CauseOf(err) != seal.CauseUnavailable && err != nil {
			t.Errorf("step %d: %v", n, err)
		}
		b.proxy.Heal()
		if v := b.ensure(); v == 0 {
			t.Errorf("step %d: the counter is at 0", n)
		}
		if err := b.raise(b.ensure() + 1); err != nil {
			t.Errorf("step %d: %v", n, err)
		}
	}
	if steps < 5 {
		t.Errorf("Ensure is %d commands; nothing was tried", steps)
	}
}

func TestRaiseTo(t *testing.T) {
	b := newBench(t)
	b.want(b.raise(1), seal.CauseEpoch, "gone", "kleidi recover")
	start := b.ensure()
	for _, c := range []struct {
		to, after uint64
		ok        bool
	}{
		{0, start, true}, {start, start, true}, {start + 1, start + 1, true}, {start + 1, start + 1, true},
		{start, start + 1, true}, {start + 18, start + 1, false}, {1<<64 - 1, start + 1, false}, {start + 2, start + 2, true},
		{start + 5, start + 5, true},
	} {
		if err := b.raise(c.to); (err == nil) != c.ok {
			t.Errorf("RaiseTo(%d): %v", c.to, err)
		}
		if got := b.ensure(); got != c.after {
			t.Errorf("after RaiseTo(%d): %d, want %d", c.to, got, c.after)
		}
	}
}

// TestForeignIndex: every call refuses any other index at that number, and leaves it
// unchanged.
func TestForeignIndex(t *testing.T) {
	with := func(change func(*tpm2.TPMSNVPublic)) tpm2.TPMSNVPublic {
		p := tpm2.TPMSNVPublic{DataSize: 8, Attributes: counterAttributes}
		change(&p)
		return p
	}
	for name, public := range map[string]tpm2.TPMSNVPublic{
		"ordinary":            with(func(p *tpm2.TPMSNVPublic) { p.Attributes.NT = tpm2.TPMNTOrdinary }),
		"bits":                with(func(p *tpm2.TPMSNVPublic) { p.Attributes.NT = tpm2.TPMNTBits }),
		"larger":              with(func(p *tpm2.TPMSNVPublic) { p.Attributes.NT = tpm2.TPMNTOrdinary; p.DataSize = 16 }),
		"written by password": with(func(p *tpm2.TPMSNVPublic) { p.Attributes.AuthWrite = true }),
		"with lockout":        with(func(p *tpm2.TPMSNVPublic) { p.Attributes.NoDA = false }),
		"lost at reset":       with(func(p *tpm2.TPMSNVPublic) { p.Attributes.Orderly = true }),
		"not to be read":      with(func(p *tpm2.TPMSNVPublic) { p.Attributes.AuthRead = false }),
		"with a policy": with(func(p *tpm2.TPMSNVPublic) {
			p.Attributes.PolicyWrite = true
			p.AuthPolicy.Buffer = make([]byte, 32)
		}),
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.must(func(tp transport.TPM) error { return define(tp, "", public) })
			_, err := b.value(b.counter.Ensure)
			b.want(err, seal.CauseEpoch, "something other", "tpm.epochIndex", "0x01804b01")
			_, err = b.value(b.counter.Read)
			b.want(err, seal.CauseEpoch, "something other")
			b.want(b.raise(1), seal.CauseEpoch, "something other")
			for _, code := range []tpm2.TPMCC{tpm2.TPMCCNVDefineSpace, tpm2.TPMCCNVUndefineSpace, tpm2.TPMCCNVIncrement, tpm2.TPMCCNVWrite} {
				if n := b.proxy.Count(code); n != 0 {
					t.Errorf("%d times %v", n, code)
				}
			}
		})
	}
}

// policy satisfies what a slot of this epoch would demand of the counter.
func (b *bench) policy(atMost uint64) error {
	return b.proxy.TPM(0).Do(b.Context(), func(t transport.TPM) error {
		terms := authpolicy.Terms{authpolicy.Epoch{Index: index, Name: b.counter.Name(), AtMost: atMost}}
		want, err := terms.Digest()
		if err != nil {
			return err
		}
		s, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, 16)
		if err != nil {
			return err
		}
		defer func() { _ = done() }()
		if err := terms.Satisfy(t, s); err != nil {
			return err
		}
		r, err := tpm2.PolicyGetDigest{PolicySession: s.Handle()}.Execute(t)
		if err == nil && !bytes.Equal(r.PolicyDigest.Buffer, want) {
			err = errOtherDigest
		}
		return err
	})
}

var errOtherDigest = errors.New("the session has another digest")

// TestMadeAnewStartsAbove: removing the counter and defining it again, byte for byte,
// revives no earlier epoch.
func TestMadeAnewStartsAbove(t *testing.T) {
	b := newBench(t)
	start := b.ensure()
	for range 3 {
		if err := b.raise(b.ensure() + 1); err != nil {
			t.Fatal(err)
		}
	}
	last := b.ensure()
	if err := b.policy(last); err != nil {
		t.Fatalf("the present epoch: %v", err)
	}
	b.must(undefine)
	_, err := b.value(b.counter.Read)
	b.want(err, seal.CauseEpoch, "gone", "kleidi recover")
	if err := b.policy(last); !errors.Is(err, authpolicy.ErrCounter) {
		t.Errorf("without the counter: %v", err)
	}
	if again := b.ensure(); again <= last {
		t.Errorf("after it was made again, it starts at %d; it was at %d", again, last)
	}
	for v := start; v <= last; v++ {
		if err := b.policy(v); !errors.Is(err, authpolicy.ErrEpoch) {
			t.Errorf("epoch %d is back: %v", v, err)
		}
	}
}

// TestReplacedIndex: an index of another kind in the counter's place, with the value of
// an earlier epoch, satisfies no slot. If the TPM itself refuses to compare it, the
// error says that it is not the counter.
func TestReplacedIndex(t *testing.T) {
	readable := tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, AuthWrite: true, NoDA: true}
	hidden, locked := readable, readable
	hidden.AuthRead, locked.ReadSTClear = false, true
	for name, c := range map[string]struct {
		public tpm2.TPMSNVPublic
		auth   string
		want   error
	}{
		"a forged value": {tpm2.TPMSNVPublic{DataSize: 8, Attributes: readable}, "", errOtherDigest},
		"another size":   {tpm2.TPMSNVPublic{DataSize: 4, Attributes: readable}, "", authpolicy.ErrCounter},
		"unreadable":     {tpm2.TPMSNVPublic{DataSize: 8, Attributes: hidden}, "", authpolicy.ErrCounter},
		"with a value":   {tpm2.TPMSNVPublic{DataSize: 8, Attributes: readable}, "secret", authpolicy.ErrCounter},
		"read-locked":    {tpm2.TPMSNVPublic{DataSize: 8, Attributes: locked}, "", authpolicy.ErrCounter},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			start := b.ensure()
			b.must(func(tp transport.TPM) error { return forge(tp, c.auth, c.public) })
			if err := b.policy(start); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// forge puts an index of zeros in the counter's place.
func forge(t transport.TPM, auth string, public tpm2.TPMSNVPublic) error {
	if err := undefine(t); err != nil {
		return err
	}
	if err := define(t, auth, public); err != nil {
		return err
	}
	forged := func() tpm2.NamedHandle {
		r, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(t)
		if err != nil {
			return tpm2.NamedHandle{}
		}
		return tpm2.NamedHandle{Handle: tpm2.TPMHandle(index), Name: r.NVName}
	}
	zeros := tpm2.TPM2BMaxNVBuffer{Buffer: make([]byte, public.DataSize)}
	if _, err := (tpm2.NVWrite{AuthHandle: ownerAuth(""), NVIndex: forged(), Data: zeros}).Execute(t); err != nil {
		return err
	}
	if !public.Attributes.ReadSTClear {
		return nil
	}
	_, err := tpm2.NVReadLock{AuthHandle: ownerAuth(""), NVIndex: forged()}.Execute(t)
	return err
}

// TestOwnerAuthorization: with the value in a file everything works, and the value does
// not cross the bus. With no value or a wrong one, the error names the cause and the
// setting, and an existing counter can still be read.
func TestOwnerAuthorization(t *testing.T) {
	b := newBench(t)
	const secret = "correct horse battery staple"
	b.must(func(tp transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: ownerAuth(""), NewAuth: tpm2.TPM2BAuth{Buffer: []byte(secret)}}.Execute(tp)
		return err
	})
	file := func(content string) keys.Owner {
		path := filepath.Join(t.TempDir(), "owner")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return keys.Owner{File: path}
	}
	for name, owner := range map[string]keys.Owner{"none": {}, "wrong": file("guess"), "empty": file(""), "two newlines": file(secret + "\n\n"),
		"too long": file(strings.Repeat("x", 65)), "missing": {File: filepath.Join(t.TempDir(), "none")}} {
		b.useOwner(owner)
		_, err := b.value(b.counter.Ensure)
		if b.want(err, seal.CauseCredentials, "tpm.ownerAuthFile"); err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v shows the value", name, err)
		}
	}
	for _, content := range []string{secret, secret + "\n"} {
		b.useOwner(file(content))
		if err := b.raise(b.ensure() + 1); err != nil {
			t.Error(err)
		}
	}
	if b.proxy.Saw([]byte(secret)) {
		t.Error("the owner authorization crossed the bus in plain")
	}
}
