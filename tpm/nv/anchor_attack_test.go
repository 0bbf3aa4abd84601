package nv_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// foreign is an index that another OS would make in order to fill it.
var foreign = tpm2.TPMSNVPublic{DataSize: nv.AnchorSize, Attributes: tpm2.TPMANV{OwnerWrite: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary}}

// fill writes an index that the owner may write.
func fill(t transport.TPM, value [nv.AnchorSize]byte) error {
	r, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(anchorIndex)}.Execute(t)
	if err != nil {
		return err
	}
	_, err = tpm2.NVWrite{AuthHandle: ownerAuth(""), NVIndex: tpm2.NamedHandle{Handle: tpm2.TPMHandle(anchorIndex), Name: r.NVName},
		Data: tpm2.TPM2BMaxNVBuffer{Buffer: value[:]}}.Execute(t)
	return err
}

// TestAnchorFilledFromAnotherOS: an index that the owner may write is not the anchor,
// even with the anchored value. It stays unchanged until Replace.
func TestAnchorFilledFromAnotherOS(t *testing.T) {
	both, larger, password, byOther := foreign, foreign, foreign, foreign
	both.AuthPolicy, both.Attributes.PolicyWrite = newAnchorBench(t).genuine().AuthPolicy, true
	larger.DataSize++
	password.Attributes.AuthWrite = true
	byOther.AuthPolicy.Buffer, byOther.Attributes.PolicyWrite = make([]byte, 32), true
	for name, public := range map[string]tpm2.TPMSNVPublic{"written by the owner": foreign, "and in the boot state": both, "larger": larger,
		"and by a password": password, "and in any boot state": byOther} {
		t.Run(name, func(t *testing.T) {
			b := newAnchorBench(t)
			b.ok(b.define())
			b.ok(b.write(filled(1)))
			b.must(func(tp transport.TPM) error {
				if err := undefineAt(tp, anchorIndex); err != nil {
					return err
				}
				if err := defineAt(tp, anchorIndex, "", public); err != nil {
					return err
				}
				return fill(tp, filled(1))
			})
			_, err := b.read()
			b.wantAnchor(err, nv.ErrAnchorReplaced)
			b.wantAnchor(b.write(filled(2)), nv.ErrAnchorReplaced)
			b.wantAnchor(b.define(), nv.ErrAnchorReplaced)
			if n := b.proxy.Count(tpm2.TPMCCNVUndefineSpace); n != 0 {
				t.Error("it was removed unasked")
			}
			b.ok(b.replace())
			_, err = b.read()
			b.wantAnchor(err, nv.ErrAnchorUnwritten)
			b.ok(b.write(filled(3)))
			b.holds(filled(3))
		})
	}
}

// TestAnchorMadeAnewFromAnotherOS: if an attacker defines the anchor's own index again,
// it is empty, and the attacker can't fill it. With an authorization value, which no
// Name covers, only the attacker can read it.
func TestAnchorMadeAnewFromAnotherOS(t *testing.T) {
	for _, auth := range []string{"", "secret"} {
		b := newAnchorBench(t)
		b.ok(b.define())
		b.ok(b.write(filled(1)))
		boot := b.machine.Current()
		insecure := boot
		insecure.SecureBoot = false
		b.machine.Reboot(insecure)
		b.must(func(tp transport.TPM) error {
			if err := undefineAt(tp, anchorIndex); err != nil {
				return err
			}
			return defineAt(tp, anchorIndex, auth, b.genuine())
		})
		b.want(b.write(filled(1)), seal.CauseBootState)
		b.machine.Reboot(boot)
		_, err := b.read()
		b.wantAnchor(err, nv.ErrAnchorUnwritten)
		b.ok(b.write(filled(2)))
		if auth == "" {
			b.holds(filled(2))
			continue
		}
		_, err = b.read()
		b.wantAnchor(err, nv.ErrAnchorReplaced)
		b.ok(b.replace())
		b.ok(b.write(filled(2)))
		b.holds(filled(2))
	}
}

// TestAnchorInterrupted: a power failure at any command leaves the old value, the new
// value, or no anchor, and repeating the operation helps.
func TestAnchorInterrupted(t *testing.T) {
	steps := func(b *anchorBench) error { return errors.Join(b.replace(), b.write(filled(2))) }
	clean := newAnchorBench(t)
	clean.ok(clean.define())
	clean.ok(clean.write(filled(1)))
	clean.proxy.Forget()
	clean.ok(steps(clean))
	n := len(clean.proxy.Traffic())
	if n < 10 {
		t.Fatalf("%d commands; nothing was tried", n)
	}
	for action, do := range map[string]tpmtest.Action{"before": tpmtest.Drop, "after": func(_ []byte, send func() []byte) []byte { send(); return nil }} {
		for i := range n {
			b := newAnchorBench(t)
			b.ok(b.define())
			b.ok(b.write(filled(1)))
			b.proxy.Inject(tpmtest.Fault{After: i, Do: do})
			_ = steps(b)
			b.machine.CutPower()
			b.machine.Reboot(b.machine.Current())
			b.proxy.Heal()
			switch value, err := b.read(); {
			case err == nil && value != filled(1) && value != filled(2):
				t.Errorf("%s command %d: %x", action, i, value)
			case err != nil && !errors.Is(err, nv.ErrAnchorMissing) && !errors.Is(err, nv.ErrAnchorUnwritten):
				t.Errorf("%s command %d: %v", action, i, err)
			}
			b.ok(steps(b))
			b.holds(filled(2))
		}
	}
}

// TestAnchorOverAForgedBus: an impostor in the TPM's place, or an attacker who changes
// commands, can make the anchor unreadable, but never different.
func TestAnchorOverAForgedBus(t *testing.T) {
	b := newAnchorBench(t)
	b.ok(b.define())
	b.ok(b.write(filled(1)))
	replace := func(in []byte, old, new [nv.AnchorSize]byte) []byte { return bytes.Replace(in, old[:], new[:], 1) }

	b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVRead, Do: tpmtest.Change(func(r []byte) []byte { return replace(r, filled(1), filled(2)) })})
	if value, err := b.read(); err == nil {
		t.Errorf("a forged answer is read: %x", value)
	}
	b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVWrite, Times: 1, Do: tpmtest.Code(tpm2.TPMRCSuccess)})
	if b.write(filled(2)) == nil {
		t.Error("a write that never came to the TPM is believed")
	}
	b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVWrite, Do: func(command []byte, send func() []byte) []byte {
		copy(command, replace(command, filled(2), filled(3)))
		return send()
	}})
	if b.write(filled(2)) == nil {
		t.Error("a write that was changed on its way is believed")
	}
	b.proxy.Heal()
	b.holds(filled(1))

	// The impostor's own index, shown as the anchor's.
	var public []byte
	b.must(func(tp transport.TPM) error {
		r, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(anchorIndex)}.Execute(tp)
		if err != nil {
			return err
		}
		public = append(tpm2.Marshal(r.NVPublic), tpm2.Marshal(r.NVName)...)
		if err := undefineAt(tp, anchorIndex); err != nil {
			return err
		}
		if err := defineAt(tp, anchorIndex, "", foreign); err != nil {
			return err
		}
		return fill(tp, filled(1))
	})
	b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVReadPublic, Do: tpmtest.Change(func(r []byte) []byte { return append(r[:10:10], public...) })})
	_, err := b.read()
	b.wantAnchor(err, nv.ErrAnchorReplaced)
	b.wantAnchor(b.write(filled(2)), nv.ErrAnchorReplaced)
	b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVReadPublic, Do: tpmtest.Truncate(30)})
	if _, err := b.read(); err == nil {
		t.Error("half an answer is read")
	}
}

// TestAnchorSessionsAreSalted: everybody knows the key of an unsalted session, so an
// attacker on the bus could change the written value, or forge the confirmation.
func TestAnchorSessionsAreSalted(t *testing.T) {
	b := newAnchorBench(t)
	b.ok(b.define())
	b.proxy.Forget()
	b.ok(b.write(filled(1)))
	b.holds(filled(1))
	sessions := 0
	for _, e := range b.proxy.Traffic() {
		if e.Code != tpm2.TPMCCStartAuthSession {
			continue
		}
		sessions++
		if key := tpm2.TPMHandle(binary.BigEndian.Uint32(e.Command[10:])); key == tpm2.TPMRHNull {
			t.Errorf("session %d is not salted", sessions)
		}
	}
	if sessions != 2 {
		t.Errorf("%d sessions, want one to write and one to read", sessions)
	}
}
