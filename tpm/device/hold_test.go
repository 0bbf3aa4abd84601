package device_test

import (
	"context"
	"encoding/binary"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
	"github.com/beezy-dev/kleidi/tpm/slowtpm"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// unlock uses the TPM as kleidi serve does at start.
func (n *node) unlock(slot seal.Slot) {
	n.Helper()
	ctx, release := n.Device.Hold(n.Context())
	defer release()
	if err := n.Gate.Attest(ctx, []seal.Slot{slot}); err != nil {
		n.Fatalf("Attest: %v", err)
	}
	kek, err := n.Unwrap(ctx, slot)
	if err != nil {
		n.Fatalf("Unwrap: %v", err)
	}
	defer kek.Close()
	if err := n.Settle(ctx, []seal.Slot{slot}); err != nil {
		n.Fatalf("Settle: %v", err)
	}
}

// counted runs f and counts the commands by kind.
func (n *node) counted(f func()) (all, curve int) {
	n.Proxy.Forget()
	f()
	for _, e := range n.Proxy.Traffic() {
		if slowtpm.KindOf(e.Command) == slowtpm.Curve {
			curve++
		}
	}
	return len(n.Proxy.Traffic()), curve
}

// TestFewCommandsToUnlock counts the TPM commands of an unlock, most of whose time goes
// into elliptic-curve keys.
func TestFewCommandsToUnlock(t *testing.T) {
	n := newNode(t)
	n.Gate.Node = "alpha"
	n.Gate.AK = attest.AKFile(filepath.Join(t.TempDir(), "ak.json"))
	slot := n.Sealed(n.KEK())
	if all, curve := n.counted(func() { n.unlock(slot) }); all > 20 || curve > 4 {
		t.Errorf("%d commands, %d of them for elliptic curves; want at most 20 and 4", all, curve)
	}
	n.Must(func(tp transport.TPM) error {
		r, err := tpm2.CreatePrimary{PrimaryHandle: nodetest.OwnerHandle(), InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(tp)
		if err != nil {
			return err
		}
		_, err = tpm2.EvictControl{Auth: nodetest.OwnerHandle(), ObjectHandle: &tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PersistentHandle: 0x81000001}.Execute(tp)
		return err
	})
	if all, curve := n.counted(func() { n.unlock(slot) }); all > 20 || curve > 3 {
		t.Errorf("with a persistent storage root key: %d commands, %d of them for elliptic curves; want at most 20 and 3", all, curve)
	}
}

// leftovers returns the handles that the TPM gave out and nobody flushed.
func (n *node) leftovers() (handles []uint32) {
	for _, e := range n.Proxy.Traffic() {
		switch e.Code {
		case tpm2.TPMCCCreatePrimary, tpm2.TPMCCLoad, tpm2.TPMCCStartAuthSession:
			handles = append(handles, binary.BigEndian.Uint32(e.Response[10:]))
		case tpm2.TPMCCFlushContext:
			i := slices.Index(handles, binary.BigEndian.Uint32(e.Command[10:]))
			handles = slices.Delete(handles, i, i+1)
		}
	}
	return handles
}

// TestHoldFlushes: at the end of a hold nothing stays loaded in the TPM.
func TestHoldFlushes(t *testing.T) {
	n := newNode(t)
	n.Gate.Node = "alpha"
	n.Gate.AK = attest.AKFile(filepath.Join(t.TempDir(), "ak.json"))
	slot := n.Sealed(n.KEK())
	n.Proxy.Forget()
	n.unlock(slot)
	if left := n.leftovers(); len(left) > 0 {
		t.Errorf("%x stay loaded", left)
	}
}

// TestHoldIsOneConnection: the operations of a hold share a connection until the hold
// ends, or until another operation wants the TPM, which then gets it.
func TestHoldIsOneConnection(t *testing.T) {
	_, p := newProxy(t)
	d := p.TPM(0)
	ctx, release := d.Hold(t.Context())
	do := func(name string, ctx context.Context, opens int) {
		t.Helper()
		p.Forget()
		for range 3 {
			if err := d.Do(ctx, getRandom); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if n := p.Count(tpm2.TPMCCGetCapability) / 2; n != opens { // every opening looks for leftovers
			t.Errorf("%s: the TPM was opened %d times, want %d", name, n, opens)
		}
	}
	do("held", ctx, 1)
	do("held, again", ctx, 0)
	do("another operation", t.Context(), 3)
	do("held, after it", ctx, 1)
	release()
	do("the held context, after the end", ctx, 3)
}

// TestIdleHoldGivesWay: an idle hold does not keep other processes from the TPM, and
// goes on afterwards.
func TestIdleHoldGivesWay(t *testing.T) {
	_, p := newProxy(t)
	d, other := p.TPM(2*time.Minute), p.TPM(2*time.Minute)
	ctx, release := d.Hold(t.Context())
	defer release()
	for _, d := range []*device.Device{d, other, d} {
		if err := d.Do(ctx, getRandom); err != nil {
			t.Error(err)
		}
	}
}

// TestHoldAmongMany: operations of holds and other operations succeed at the same time.
func TestHoldAmongMany(t *testing.T) {
	_, p := newProxy(t)
	d := p.TPM(2 * time.Minute)
	var all sync.WaitGroup
	for i := range 6 {
		all.Go(func() {
			ctx, release := t.Context(), func() {}
			if i%2 == 0 {
				ctx, release = d.Hold(ctx)
			}
			defer release()
			for range 20 {
				if err := d.Do(ctx, getRandom); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

// TestHoldSurvivesAFault: a connection that broke, hung or returned nonsense is not
// used again, and the next operation opens a new one.
func TestHoldSurvivesAFault(t *testing.T) {
	_, p := newProxy(t)
	d := p.TPM(15 * time.Second) // only after "hang" does an operation wait for this long
	ctx, release := d.Hold(t.Context())
	defer release()
	faults := map[string]tpmtest.Action{"drop": tpmtest.Drop, "hang": tpmtest.Hang, "truncated": tpmtest.Truncate(11)}
	for name, garbage := range tpmtest.Garbage() {
		faults[name] = tpmtest.Raw(garbage.Answer)
	}
	for name, action := range faults {
		p.Inject(tpmtest.Fault{On: tpm2.TPMCCGetRandom, Times: 1, Do: action})
		if err := d.Do(ctx, getRandom); err == nil {
			t.Errorf("%s: no error", name)
		}
		if err := d.Do(ctx, getRandom); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
	}
}

// TestHoldOutlivesAnOperationsContext: the deadline of one operation is not the next one's.
func TestHoldOutlivesAnOperationsContext(t *testing.T) {
	_, p := newProxy(t)
	d := p.TPM(0)
	ctx, release := d.Hold(t.Context())
	defer release()
	for range 3 {
		one, cancel := context.WithCancel(ctx)
		if err := d.Do(one, getRandom); err != nil {
			t.Error(err)
		}
		cancel()
	}
	if n := p.Count(tpm2.TPMCCGetCapability); n != 2 {
		t.Errorf("%d commands looked for leftovers: the connection was opened again", n)
	}
}
