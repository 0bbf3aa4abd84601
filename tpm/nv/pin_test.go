package nv_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

const pinIndex = uint32(nv.DefaultPinIndex)

// pinBench is a machine and the terms of the boot state that it is in.
type pinBench struct {
	*bench
	pin   *nv.Pin
	terms authpolicy.Terms
}

func newPinBench(t *testing.T) *pinBench {
	t.Helper()
	b := newBench(t)
	pin, err := nv.NewPin(pinIndex, tpm.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	return &pinBench{b, pin, authpolicy.Terms{b.present()}}
}

// present is the boot state that the machine is in.
func (b *bench) present() (pcr authpolicy.PCR) {
	b.Helper()
	b.must(func(tp transport.TPM) (err error) {
		pcr.Bank = crypto.SHA256
		pcr.Values, err = tpm.ReadPCRs(tp, pcr.Bank, []int{4, 7, 11})
		return err
	})
	return pcr
}

func (b *pinBench) define() error {
	return b.with(func(t transport.TPM, srk *tpm.SRK) error { return b.pin.Define(t, srk, b.terms) })
}

func (b *pinBench) replace() error {
	return b.with(func(t transport.TPM, srk *tpm.SRK) error { return b.pin.Replace(t, srk, b.terms) })
}

func (b *pinBench) remove() error { return b.with(b.pin.Remove) }

func (b *pinBench) write(value [nv.PinSize]byte) error {
	return b.with(func(t transport.TPM, srk *tpm.SRK) error { return b.pin.Write(t, srk, b.terms, value) })
}

func (b *pinBench) read() (value [nv.PinSize]byte, err error) {
	err = b.with(func(t transport.TPM, srk *tpm.SRK) (err error) {
		value, err = b.pin.Read(t, srk, b.terms)
		return err
	})
	return value, err
}

// holds demands that the pin can be read and is value.
func (b *pinBench) holds(value [nv.PinSize]byte) {
	b.Helper()
	if got, err := b.read(); err != nil || got != value {
		b.Errorf("the pin holds %x, %v; want %x", got, err, value)
	}
}

// wantPin demands one of the errors about the index, with its cause.
func (b *pinBench) wantPin(err, want error) {
	b.Helper()
	b.want(err, seal.CausePin, "0x01804b02", "kleidi recover")
	for _, sentinel := range []error{nv.ErrPinMissing, nv.ErrPinUnwritten, nv.ErrPinReplaced} {
		if errors.Is(err, sentinel) != (sentinel == want) {
			b.Errorf("%v, want %v", err, want)
		}
	}
}

func (b *pinBench) ok(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func filled(x byte) (value [nv.PinSize]byte) {
	return [nv.PinSize]byte(bytes.Repeat([]byte{x}, nv.PinSize))
}

// genuine is the public area of the pin's own index.
func (b *pinBench) genuine() tpm2.TPMSNVPublic {
	b.Helper()
	digest, err := b.terms.Digest()
	b.ok(err)
	return tpm2.TPMSNVPublic{DataSize: nv.PinSize, AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		Attributes: tpm2.TPMANV{PolicyWrite: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary}}
}

func TestNewPinTakesTheOwnersRangeOnly(t *testing.T) {
	for i, ok := range map[uint32]bool{0x0180_0000: true, pinIndex: true, 0x01BF_FFFF: true, 0: false, 0x017F_FFFF: false, 0x01C0_0000: false, 0x8100_0001: false} {
		p, err := nv.NewPin(i, tpm.Owner{})
		if (err == nil) != ok || ok && p.Index() != i {
			t.Errorf("%#08x: %v", i, err)
		}
	}
	if pinIndex == index {
		t.Error("the pin and the epoch counter have one index")
	}
}

// TestPinName: the Name that is computed from code is the TPM's; other terms and
// other indices have others.
func TestPinName(t *testing.T) {
	b := newPinBench(t)
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	want, err := b.pin.Name(b.terms)
	b.ok(err)
	b.must(func(tp transport.TPM) error {
		r, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(pinIndex)}.Execute(tp)
		if err == nil && !bytes.Equal(r.NVName.Buffer, want) {
			t.Errorf("the TPM has %x, computed %x", r.NVName.Buffer, want)
		}
		return err
	})
	other, err := nv.NewPin(pinIndex+1, tpm.Owner{})
	b.ok(err)
	if name, err := other.Name(b.terms); err != nil || bytes.Equal(name, want) {
		t.Errorf("two indices have one Name: %x, %v", name, err)
	}
	if name, err := b.pin.Name(append(b.terms, authpolicy.Resets{})); err != nil || bytes.Equal(name, want) {
		t.Errorf("two authorization policies have one Name: %x, %v", name, err)
	}
}

// TestPinTermsBindABootState: what any OS could write is no pin.
func TestPinTermsBindABootState(t *testing.T) {
	b := newPinBench(t)
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	good := b.terms
	for _, terms := range []authpolicy.Terms{nil, {authpolicy.Resets{AtMost: 1<<32 - 1}}, {authpolicy.Epoch{Index: index, Name: b.counter.Name(), AtMost: 9}}} {
		b.terms = terms
		_, readErr := b.read()
		for name, err := range map[string]error{"Define": b.define(), "Replace": b.replace(), "Write": b.write(filled(2)), "Read": readErr} {
			if err == nil {
				t.Errorf("%s takes %v", name, terms)
			}
		}
		if _, err := b.pin.Name(terms); err == nil {
			t.Errorf("Name takes %v", terms)
		}
	}
	b.terms = good
	b.holds(filled(1))
}

// TestPin: it holds what was written last, across boots in the same boot state.
func TestPin(t *testing.T) {
	b := newPinBench(t)
	_, err := b.read()
	b.wantPin(err, nv.ErrPinMissing)
	b.wantPin(b.write(filled(1)), nv.ErrPinMissing)
	b.ok(b.remove()) // nothing
	for range 2 {
		b.ok(b.define())
		_, err = b.read()
		b.wantPin(err, nv.ErrPinUnwritten)
	}
	for i := range byte(3) {
		b.ok(b.write(filled(i)))
		b.holds(filled(i))
		b.ok(b.define())
		b.machine.Reboot(b.machine.Current())
		b.holds(filled(i))
	}
	b.ok(b.remove())
	_, err = b.read()
	b.wantPin(err, nv.ErrPinMissing)
}

// TestPinInAnotherBootState: with Secure Boot off, the pin can be read and not
// be written, whatever authorization is tried.
func TestPinInAnotherBootState(t *testing.T) {
	b := newPinBench(t)
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	boot := b.machine.Current()
	insecure := boot
	insecure.SecureBoot = false
	b.machine.Reboot(insecure)
	err := b.write(filled(2))
	b.want(err, seal.CauseBootState, "0x01804b02", "kleidi recover")
	if !errors.Is(err, authpolicy.ErrBootState) {
		t.Error(err)
	}
	name, err := b.pin.Name(b.terms)
	b.ok(err)
	own := tpm2.NamedHandle{Handle: tpm2.TPMHandle(pinIndex), Name: tpm2.TPM2BName{Buffer: name}}
	b.must(func(tp transport.TPM) error {
		value := filled(2)
		for who, auth := range map[string]tpm2.AuthHandle{"the owner": ownerAuth(""), "a password": {Handle: own.Handle, Name: own.Name, Auth: tpm2.PasswordAuth(nil)},
			"the platform": {Handle: tpm2.TPMRHPlatform, Name: tpm2.HandleName(tpm2.TPMRHPlatform), Auth: tpm2.PasswordAuth(nil)}} {
			if _, err := (tpm2.NVWrite{AuthHandle: auth, NVIndex: own, Data: tpm2.TPM2BMaxNVBuffer{Buffer: value[:]}}).Execute(tp); err == nil {
				t.Errorf("%s writes the pin", who)
			}
		}
		session, done, err := tpm2.PolicySession(tp, tpm2.TPMAlgSHA256, 16) // a session in which nothing was checked
		if err != nil {
			return err
		}
		defer func() { _ = done() }()
		_, err = tpm2.NVWrite{AuthHandle: tpm2.AuthHandle{Handle: own.Handle, Name: own.Name, Auth: session}, NVIndex: own, Data: tpm2.TPM2BMaxNVBuffer{Buffer: value[:]}}.Execute(tp)
		if !errors.Is(err, tpm2.TPMRCPolicyFail) {
			t.Errorf("an empty session: %v", err)
		}
		return nil
	})
	b.holds(filled(1))
	b.machine.Reboot(boot)
	b.ok(b.write(filled(3)))
	b.holds(filled(3))
}

// TestPinOfAnEarlierAuthorizationPolicy: after Replace, who puts back a keyring
// that names the earlier terms finds no pin under them.
func TestPinOfAnEarlierAuthorizationPolicy(t *testing.T) {
	b := newPinBench(t)
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	earlier := b.terms
	b.terms = authpolicy.Terms{b.present(), authpolicy.Resets{AtMost: 1<<32 - 1}}
	_, err := b.read()
	b.wantPin(err, nv.ErrPinReplaced)
	b.ok(b.replace())
	b.ok(b.write(filled(2)))
	b.holds(filled(2))
	b.terms = earlier
	_, err = b.read()
	b.wantPin(err, nv.ErrPinReplaced)
}

// TestPinOfASignedBootState: under an operator's key, the pin outlives a change
// of the boot state that was signed, and no other.
func TestPinOfASignedBootState(t *testing.T) {
	b := newPinBench(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	b.ok(err)
	public, err := authpolicy.PublicKey(key.Public())
	b.ok(err)
	a := authpolicy.Authorized{Key: public}
	sign := func(pcr authpolicy.PCR) {
		digest, err := authpolicy.ApprovedDigest(pcr)
		b.ok(err)
		hash, err := authpolicy.AuthorizedHash(digest, nil)
		b.ok(err)
		raw, err := key.Sign(rand.Reader, hash, crypto.SHA256)
		b.ok(err)
		signature, err := authpolicy.Signature(key.Public(), raw)
		b.ok(err)
		a.States = append(a.States, authpolicy.SignedState{Bank: pcr.Bank, PCRs: []int{4, 7, 11}, Digest: digest, Signature: signature})
	}
	sign(b.present())
	b.terms = authpolicy.Terms{a}
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	next := b.machine.Current()
	next.Kernel = "6.12.58+deb13-amd64"
	b.machine.Reboot(next)
	b.holds(filled(1))
	err = b.write(filled(2))
	if b.want(err, seal.CauseBootState); !errors.Is(err, authpolicy.ErrNoSignedState) {
		t.Error(err)
	}
	sign(b.present())
	b.terms = authpolicy.Terms{a}
	b.ok(b.write(filled(2)))
	b.holds(filled(2))
}

// TestPinOfAnEpoch: that the epoch has passed has its cause.
func TestPinOfAnEpoch(t *testing.T) {
	b := newPinBench(t)
	b.terms = append(b.terms, authpolicy.Epoch{Index: index, Name: b.counter.Name(), AtMost: b.ensure()})
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	b.ok(b.raise(b.ensure() + 1))
	b.want(b.write(filled(2)), seal.CauseEpoch)
	b.must(undefine)
	b.want(b.write(filled(2)), seal.CauseEpoch)
	b.holds(filled(1))
}

// TestPinRefusals: what the TPM answers to a command on the index has its error,
// and a PCR that was extended meanwhile is no refusal.
func TestPinRefusals(t *testing.T) {
	b := newPinBench(t)
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	for code, want := range map[tpm2.TPMRC]error{tpm2.TPMRCNVUninitialized: nv.ErrPinUnwritten, tpm2.TPMRCHandle: nv.ErrPinMissing,
		tpm2.TPMRCAuthFail: nv.ErrPinReplaced, tpm2.TPMRCNVAuthorization: nv.ErrPinReplaced} {
		b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVRead, Do: tpmtest.Code(code)})
		_, err := b.read()
		b.wantPin(err, want)
	}
	for _, command := range []tpm2.TPMCC{tpm2.TPMCCNVRead, tpm2.TPMCCNVWrite, tpm2.TPMCCNVReadPublic} {
		b.proxy.Inject(tpmtest.Fault{On: command, Do: tpmtest.Code(tpm2.TPMRCFailure)})
		_, readErr := b.read()
		writeErr := b.write(filled(2))
		if failed := map[bool]error{true: writeErr, false: readErr}[command == tpm2.TPMCCNVWrite]; !errors.Is(failed, tpm2.TPMRCFailure) || seal.CauseOf(failed) == seal.CausePin {
			t.Errorf("%v fails: %v", command, failed)
		}
	}
	b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVWrite, Times: 3, Do: tpmtest.Code(tpm2.TPMRCPCRChanged)})
	b.ok(b.write(filled(4)))
	b.holds(filled(4))
	b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVWrite, Do: tpmtest.Code(tpm2.TPMRCPCRChanged)})
	if err := b.write(filled(5)); !errors.Is(err, tpm2.TPMRCPCRChanged) {
		t.Error(err)
	}
}

// TestPinWithOwnerAuthorization: making and removing the index need it, reading
// and writing do not.
func TestPinWithOwnerAuthorization(t *testing.T) {
	b := newPinBench(t)
	const secret = "correct horse battery staple"
	b.must(func(tp transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: ownerAuth(""), NewAuth: tpm2.TPM2BAuth{Buffer: []byte(secret)}}.Execute(tp)
		return err
	})
	path := filepath.Join(t.TempDir(), "owner")
	b.ok(os.WriteFile(path, []byte(secret+"\n"), 0o600))
	b.useOwner(tpm.Owner{File: path}) // for the storage root key
	without, err := nv.NewPin(pinIndex, tpm.Owner{})
	b.ok(err)
	with, err := nv.NewPin(pinIndex, b.owner)
	b.ok(err)

	b.pin = without
	b.want(b.define(), seal.CauseCredentials, "tpm.ownerAuthFile")
	b.pin = with
	b.ok(b.define())
	b.pin = without
	b.ok(b.write(filled(1)))
	b.holds(filled(1))
	b.want(b.remove(), seal.CauseCredentials, "tpm.ownerAuthFile")
	b.want(b.replace(), seal.CauseCredentials, "tpm.ownerAuthFile")
	b.holds(filled(1))
	b.pin = with
	b.ok(b.replace())
	b.ok(b.remove())
	if b.proxy.Saw([]byte(secret)) {
		t.Error("the owner authorization crossed the bus in plain")
	}
}
