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
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

const anchorIndex = uint32(nv.DefaultAnchorIndex)

// anchorBench is a machine, with the terms of its present boot state.
type anchorBench struct {
	*bench
	anchor *nv.Anchor
	terms  authpolicy.Terms
}

func newAnchorBench(t *testing.T) *anchorBench {
	t.Helper()
	b := newBench(t)
	anchor, err := nv.NewAnchor(anchorIndex, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	return &anchorBench{b, anchor, authpolicy.Terms{b.present()}}
}

// present returns the machine's present boot state.
func (b *bench) present() (pcr authpolicy.PCR) {
	b.Helper()
	b.must(func(tp transport.TPM) (err error) {
		pcr.Bank = crypto.SHA256
		pcr.Values, err = keys.ReadPCRs(tp, pcr.Bank, []int{4, 7, 11})
		return err
	})
	return pcr
}

func (b *anchorBench) define() error {
	return b.with(func(t transport.TPM, srk *keys.SRK) error { return b.anchor.Define(t, srk, b.terms) })
}

func (b *anchorBench) replace() error {
	return b.with(func(t transport.TPM, srk *keys.SRK) error { return b.anchor.Replace(t, srk, b.terms) })
}

func (b *anchorBench) remove() error { return b.with(b.anchor.Remove) }

func (b *anchorBench) write(value [nv.AnchorSize]byte) error {
	return b.with(func(t transport.TPM, srk *keys.SRK) error { return b.anchor.Write(t, srk, b.terms, value) })
}

func (b *anchorBench) read() (value [nv.AnchorSize]byte, err error) {
	err = b.with(func(t transport.TPM, srk *keys.SRK) (err error) {
		value, err = b.anchor.Read(t, srk, b.terms)
		return err
	})
	return value, err
}

// holds demands that the anchor can be read and is value.
func (b *anchorBench) holds(value [nv.AnchorSize]byte) {
	b.Helper()
	if got, err := b.read(); err != nil || got != value {
		b.Errorf("the anchor holds %x, %v; want %x", got, err, value)
	}
}

// wantAnchor demands one of the errors about the index, with its cause.
func (b *anchorBench) wantAnchor(err, want error) {
	b.Helper()
	b.want(err, seal.CauseAnchor, "0x01804b02", "kleidi recover")
	for _, sentinel := range []error{nv.ErrAnchorMissing, nv.ErrAnchorUnwritten, nv.ErrAnchorReplaced} {
		if errors.Is(err, sentinel) != (sentinel == want) {
			b.Errorf("%v, want %v", err, want)
		}
	}
}

func (b *anchorBench) ok(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func filled(x byte) (value [nv.AnchorSize]byte) {
	return [nv.AnchorSize]byte(bytes.Repeat([]byte{x}, nv.AnchorSize))
}

// genuine is the public area of the anchor's own index.
func (b *anchorBench) genuine() tpm2.TPMSNVPublic {
	b.Helper()
	digest, err := b.terms.Digest()
	b.ok(err)
	return tpm2.TPMSNVPublic{DataSize: nv.AnchorSize, AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		Attributes: tpm2.TPMANV{PolicyWrite: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary}}
}

func TestNewAnchorTakesTheOwnersRangeOnly(t *testing.T) {
	for i, ok := range map[uint32]bool{0x0180_0000: true, anchorIndex: true, 0x01BF_FFFF: true, 0: false, 0x017F_FFFF: false, 0x01C0_0000: false, 0x8100_0001: false} {
		p, err := nv.NewAnchor(i, keys.Owner{})
		if (err == nil) != ok || ok && p.Index() != i {
			t.Errorf("%#08x: %v", i, err)
		}
	}
	if anchorIndex == index {
		t.Error("the anchor and the epoch counter have one index")
	}
}

// TestAnchorName: the Name computed in code is the TPM's. Other terms and other indices
// have other Names.
func TestAnchorName(t *testing.T) {
	b := newAnchorBench(t)
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	want, err := b.anchor.Name(b.terms)
	b.ok(err)
	b.must(func(tp transport.TPM) error {
		r, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(anchorIndex)}.Execute(tp)
		if err == nil && !bytes.Equal(r.NVName.Buffer, want) {
			t.Errorf("the TPM has %x, computed %x", r.NVName.Buffer, want)
		}
		return err
	})
	other, err := nv.NewAnchor(anchorIndex+1, keys.Owner{})
	b.ok(err)
	if name, err := other.Name(b.terms); err != nil || bytes.Equal(name, want) {
		t.Errorf("two indices have one Name: %x, %v", name, err)
	}
	if name, err := b.anchor.Name(append(b.terms, authpolicy.Resets{})); err != nil || bytes.Equal(name, want) {
		t.Errorf("two authorization policies have one Name: %x, %v", name, err)
	}
}

// TestAnchorTermsBindABootState: terms that any OS could satisfy are refused.
func TestAnchorTermsBindABootState(t *testing.T) {
	b := newAnchorBench(t)
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
		if _, err := b.anchor.Name(terms); err == nil {
			t.Errorf("Name takes %v", terms)
		}
	}
	b.terms = good
	b.holds(filled(1))
}

// TestAnchor: the anchor holds the last written value, across boots in the same boot
// state.
func TestAnchor(t *testing.T) {
	b := newAnchorBench(t)
	_, err := b.read()
	b.wantAnchor(err, nv.ErrAnchorMissing)
	b.wantAnchor(b.write(filled(1)), nv.ErrAnchorMissing)
	b.ok(b.remove()) // nothing
	for range 2 {
		b.ok(b.define())
		_, err = b.read()
		b.wantAnchor(err, nv.ErrAnchorUnwritten)
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
	b.wantAnchor(err, nv.ErrAnchorMissing)
}

// TestAnchorInAnotherBootState: with Secure Boot off, the anchor can be read but not
// written, with any authorization.
func TestAnchorInAnotherBootState(t *testing.T) {
	b := newAnchorBench(t)
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
	name, err := b.anchor.Name(b.terms)
	b.ok(err)
	own := tpm2.NamedHandle{Handle: tpm2.TPMHandle(anchorIndex), Name: tpm2.TPM2BName{Buffer: name}}
	b.must(func(tp transport.TPM) error {
		value := filled(2)
		for who, auth := range map[string]tpm2.AuthHandle{"the owner": ownerAuth(""), "a password": {Handle: own.Handle, Name: own.Name, Auth: tpm2.PasswordAuth(nil)},
			"the platform": {Handle: tpm2.TPMRHPlatform, Name: tpm2.HandleName(tpm2.TPMRHPlatform), Auth: tpm2.PasswordAuth(nil)}} {
			if _, err := (tpm2.NVWrite{AuthHandle: auth, NVIndex: own, Data: tpm2.TPM2BMaxNVBuffer{Buffer: value[:]}}).Execute(tp); err == nil {
				t.Errorf("%s writes the anchor", who)
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

// TestAnchorOfAnEarlierAuthorizationPolicy: after Replace, an attacker who restores a
// keyring with the earlier terms finds no anchor under them.
func TestAnchorOfAnEarlierAuthorizationPolicy(t *testing.T) {
	b := newAnchorBench(t)
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	earlier := b.terms
	b.terms = authpolicy.Terms{b.present(), authpolicy.Resets{AtMost: 1<<32 - 1}}
	_, err := b.read()
	b.wantAnchor(err, nv.ErrAnchorReplaced)
	b.ok(b.replace())
	b.ok(b.write(filled(2)))
	b.holds(filled(2))
	b.terms = earlier
	_, err = b.read()
	b.wantAnchor(err, nv.ErrAnchorReplaced)
}

// TestAnchorOfASignedBootState: under an operator's key, the anchor survives a change
// to a signed boot state, and no other change.
func TestAnchorOfASignedBootState(t *testing.T) {
	b := newAnchorBench(t)
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

// TestAnchorOfAnEpoch: a passed epoch has its own cause.
func TestAnchorOfAnEpoch(t *testing.T) {
	b := newAnchorBench(t)
	b.terms = append(b.terms, authpolicy.Epoch{Index: index, Name: b.counter.Name(), AtMost: b.ensure()})
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	b.ok(b.raise(b.ensure() + 1))
	b.want(b.write(filled(2)), seal.CauseEpoch)
	b.must(undefine)
	b.want(b.write(filled(2)), seal.CauseEpoch)
	b.holds(filled(1))
}

// TestAnchorRefusals: each refusal of a command on the index has its error. A PCR that
// was extended in the meantime is not a refusal.
func TestAnchorRefusals(t *testing.T) {
	b := newAnchorBench(t)
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	for code, want := range map[tpm2.TPMRC]error{tpm2.TPMRCNVUninitialized: nv.ErrAnchorUnwritten, tpm2.TPMRCHandle: nv.ErrAnchorMissing,
		tpm2.TPMRCAuthFail: nv.ErrAnchorReplaced, tpm2.TPMRCNVAuthorization: nv.ErrAnchorReplaced} {
		b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVRead, Do: tpmtest.Code(code)})
		_, err := b.read()
		b.wantAnchor(err, want)
	}
	for _, command := range []tpm2.TPMCC{tpm2.TPMCCNVRead, tpm2.TPMCCNVWrite, tpm2.TPMCCNVReadPublic} {
		b.proxy.Inject(tpmtest.Fault{On: command, Do: tpmtest.Code(tpm2.TPMRCFailure)})
		_, readErr := b.read()
		writeErr := b.write(filled(2))
		if failed := map[bool]error{true: writeErr, false: readErr}[command == tpm2.TPMCCNVWrite]; !errors.Is(failed, tpm2.TPMRCFailure) || seal.CauseOf(failed) == seal.CauseAnchor {
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

// TestAnchorWithOwnerAuthorization: defining and removing the index need it; reading
// and writing do not.
func TestAnchorWithOwnerAuthorization(t *testing.T) {
	b := newAnchorBench(t)
	const secret = "correct horse battery staple"
	b.must(func(tp transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: ownerAuth(""), NewAuth: tpm2.TPM2BAuth{Buffer: []byte(secret)}}.Execute(tp)
		return err
	})
	path := filepath.Join(t.TempDir(), "owner")
	b.ok(os.WriteFile(path, []byte(secret+"\n"), 0o600))
	b.useOwner(keys.Owner{File: path}) // for the storage root key
	without, err := nv.NewAnchor(anchorIndex, keys.Owner{})
	b.ok(err)
	with, err := nv.NewAnchor(anchorIndex, b.owner)
	b.ok(err)

	b.anchor = without
	b.want(b.define(), seal.CauseCredentials, "tpm.ownerAuthFile")
	b.anchor = with
	b.ok(b.define())
	b.anchor = without
	b.ok(b.write(filled(1)))
	b.holds(filled(1))
	b.want(b.remove(), seal.CauseCredentials, "tpm.ownerAuthFile")
	b.want(b.replace(), seal.CauseCredentials, "tpm.ownerAuthFile")
	b.holds(filled(1))
	b.anchor = with
	b.ok(b.replace())
	b.ok(b.remove())
	if b.proxy.Saw([]byte(secret)) {
		t.Error("the owner authorization crossed the bus in plain")
	}
}
