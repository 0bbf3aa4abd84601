package tpm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// indexOfJ is an epoch index that no other node in the tests uses.
const indexOfJ = nv.DefaultEpochIndex + 6

// newPeer returns a node with an epoch counter at indexOfJ, and what another node knows
// of it.
func newPeer(t *testing.T) (*node, tpm.Peer) {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	n := nodeOn(t, m)
	counter, err := nv.NewCounter(indexOfJ, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	n.Counter, n.Gate.Counter = counter, counter
	p := tpm.Peer{Node: "alpha", Epoch: counterAt(t, indexOfJ)}
	if p.EK, err = n.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.Must(func(tp transport.TPM) error {
		return keys.WithSRK(tp, keys.Owner{}, nil, func(srk *keys.SRK) error {
			p.SRK = tpm2.Marshal(srk.Public)
			return nil
		})
	})
	return n, p
}

func counterAt(t *testing.T, index uint32) *nv.Counter {
	t.Helper()
	c, err := nv.NewCounter(index, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// wrapFor does the work of another node, which knows the epoch and the boot state from
// this node's record.
func (n *node) wrapFor(p tpm.Peer, kek *seal.Secret, state tpm.BootState) seal.Slot {
	n.Helper()
	epoch, err := n.Epoch(n.Context())
	if err != nil {
		n.Fatal(err)
	}
	slot, err := tpm.WrapFor(p, kek, state, epoch)
	if err != nil {
		n.Fatal(err)
	}
	return slot
}

func (n *node) state() tpm.BootState {
	n.Helper()
	s, err := n.State(n.Context())
	if err != nil {
		n.Fatal(err)
	}
	return s
}

// importer wraps as another node does, and unwraps as the node itself does.
type importer struct {
	*node
	peer tpm.Peer
}

func (i importer) Wrap(ctx context.Context, kek *seal.Secret) (seal.Slot, error) {
	if err := ctx.Err(); err != nil {
		return seal.Slot{}, err
	}
	epoch, err := i.Epoch(ctx)
	if err != nil {
		return seal.Slot{}, err
	}
	state, err := i.State(ctx)
	if err != nil {
		return seal.Slot{}, err
	}
	return tpm.WrapFor(i.peer, kek, state, epoch)
}

func TestImportSlotConformance(t *testing.T) {
	sealtest.Run(t, func(t *testing.T) sealtest.Harness {
		n, p := newPeer(t)
		other, _ := newPeer(t)
		return sealtest.Harness{Wrapper: importer{n, p}, Other: other, OtherCause: seal.CauseOtherTPM, Stride: 5}
	})
}

// TestImportSlot: an import slot opens on its TPM, in its boot state and its epoch, and
// nowhere else.
func TestImportSlot(t *testing.T) {
	n, p := newPeer(t)
	kek, state := n.KEK(), n.state()
	slot := n.wrapFor(p, kek, state)
	if d := read(t, slot); d["form"] != "import-v1" || slot.Node != "alpha" || d["boot"] != nil || len(slot.Data) > 1500 {
		t.Errorf("%d bytes: %s", len(slot.Data), slot.Data)
	}
	n.Opens(slot, kek)
	demand, err := tpm.DemandOf(slot, n.Counter)
	if err != nil || demand.EK != p.EK || !bytes.Equal(demand.State.Values[7], state.Values[7]) {
		t.Errorf("%+v, %v", demand, err)
	}
	n.Opens(n.sealedLike(slot, kek), kek) // the slot that the node makes from it
	was := n.Machine.Current()
	for name, change := range map[string]func(*simboot.Boot){
		"kernel":       func(b *simboot.Boot) { b.Kernel = "6.12.99+evil-amd64" },
		"command line": func(b *simboot.Boot) { b.CommandLine += " init=/bin/sh" },
		"Secure Boot":  func(b *simboot.Boot) { b.SecureBoot = false },
	} {
		b := was
		change(&b)
		n.Machine.Reboot(b)
		if err := n.Refuses(slot, seal.CauseBootState); !errors.Is(err, authpolicy.ErrBootState) {
			t.Errorf("%s: %v", name, err)
		}
	}
	n.Machine.Reboot(was)
	n.Opens(slot, kek)
	if err := n.Revoke(t.Context(), []seal.Slot{slot}); err != nil { // ends the slot's epoch
		t.Fatal(err)
	}
	if err := n.Refuses(slot, seal.CauseEpoch, "revoked"); !errors.Is(err, authpolicy.ErrEpoch) {
		t.Error(err)
	}
}

// sealedLike seals kek like an authenticated slot.
func (n *node) sealedLike(slot seal.Slot, kek *seal.Secret) seal.Slot {
	n.Helper()
	like, err := n.WrapLike(n.Context(), kek, slot)
	if err != nil {
		n.Fatal(err)
	}
	if form := read(n.T, like)["form"]; form != "sealed-v1" {
		n.Errorf("form %v", form)
	}
	return like
}

// TestImportSlotNamesTheOtherNodesIndex: if a node uses its own epoch index instead of
// the other node's, the TPM refuses the slot, even if the parser accepts it.
func TestImportSlotNamesTheOtherNodesIndex(t *testing.T) {
	n, p := newPeer(t)
	kek, state := n.KEK(), n.state()
	p.Epoch = counterAt(t, nv.DefaultEpochIndex)
	slot := n.wrapFor(p, kek, state)
	n.Refuses(slot, seal.CauseSlotCorrupt, "tpm.epochIndex is 0x01804b07")
	n.Counter = counterAt(t, nv.DefaultEpochIndex) // the parser agrees
	n.Refuses(slot, seal.CauseEpoch, "epoch counter")
}

// TestImportedKEKStays: TPM2_Duplicate of an imported KEK is refused, with a password
// and in the session that unseals it. TPM2_Unseal shows that this session would open
// the KEK.
func TestImportedKEKStays(t *testing.T) {
	n, p := newPeer(t)
	kek := n.KEK()
	slot := n.wrapFor(p, kek, n.state())
	var d struct {
		Public, Private, EncSeed []byte
		Epoch                    struct{ AtMost uint64 }
	}
	if err := json.Unmarshal(slot.Data, &d); err != nil {
		t.Fatal(err)
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](d.Public)
	if err != nil {
		t.Fatal(err)
	}
	policy := authpolicy.Terms{n.state().PCR, authpolicy.Epoch{Index: indexOfJ, Name: n.Counter.Name(), AtMost: d.Epoch.AtMost}}
	n.Must(func(tp transport.TPM) error {
		return keys.WithSRK(tp, keys.Owner{}, nil, func(srk *keys.SRK) error {
			parent := tpm2.AuthHandle{Handle: srk.Handle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)}
			im, err := tpm2.Import{ParentHandle: parent, ObjectPublic: tpm2.New2B(*public), Duplicate: tpm2.TPM2BPrivate{Buffer: d.Private},
				InSymSeed: tpm2.TPM2BEncryptedSecret{Buffer: d.EncSeed}, Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull}}.Execute(tp)
			if err != nil {
				return err
			}
			object, err := tpm2.Load{ParentHandle: parent, InPrivate: im.OutPrivate, InPublic: tpm2.New2B(*public)}.Execute(tp)
			if err != nil {
				return err
			}
			defer func() { _, _ = tpm2.FlushContext{FlushHandle: object.ObjectHandle}.Execute(tp) }()
			duplicate := func(auth tpm2.Session) error {
				_, err := tpm2.Duplicate{
					ObjectHandle:    tpm2.AuthHandle{Handle: object.ObjectHandle, Name: object.Name, Auth: auth},
					NewParentHandle: tpm2.NamedHandle{Handle: tpm2.TPMRHNull, Name: tpm2.HandleName(tpm2.TPMRHNull)},
					Symmetric:       tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
				}.Execute(tp)
				return err
			}
			if err := duplicate(tpm2.PasswordAuth(nil)); !errors.Is(err, tpm2.TPMRCAuthType) && !errors.Is(err, tpm2.TPMRCAuthUnavailable) {
				t.Errorf("by password: %v", err)
			}
			for what, use := range map[string]func(tpm2.Session) error{"duplicate": duplicate, "unseal": func(s tpm2.Session) error {
				_, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.ObjectHandle, Name: object.Name, Auth: s}}.Execute(tp)
				return err
			}} {
				s, done, err := tpm2.PolicySession(tp, tpm2.TPMAlgSHA256, 16)
				if err != nil {
					return err
				}
				if err := policy.Satisfy(tp, s); err != nil {
					return err
				}
				if err := use(s); what == "duplicate" && !errors.Is(err, tpm2.TPMRCPolicyFail) || what == "unseal" && err != nil {
					t.Errorf("%s in the satisfied session: %v", what, err)
				}
				_ = done()
			}
			return nil
		})
	})
}

// TestTamperedImportSlot: no change of a field makes the slot open to anything else,
// and a sealed slot and an import slot are never confused.
func TestTamperedImportSlot(t *testing.T) {
	n, p := newPeer(t)
	kek := n.KEK()
	slot, other := n.wrapFor(p, kek, n.state()), read(t, n.wrapFor(p, n.KEK(), n.state()))
	own := n.Sealed(kek)
	n.Opens(own, kek)
	sealed := read(t, own)
	for name, change := range map[string]func(d document){
		"form":               func(d document) { d["form"] = "sealed-v1" },
		"no seed":            func(d document) { delete(d, "encSeed") },
		"seed, empty":        func(d document) { d["encSeed"] = "" },
		"seed, another's":    func(d document) { d["encSeed"] = other["encSeed"] },
		"private, another's": func(d document) { d["private"] = other["private"] },
		"public, another's":  func(d document) { d["public"] = other["public"] },
		"private, sealed":    func(d document) { d["private"] = sealed["private"] },
		"public, sealed":     func(d document) { d["public"] = sealed["public"] },
		"sealed, with a seed": func(d document) {
			d["public"], d["private"], d["form"] = sealed["public"], sealed["private"], "sealed-v1"
		},
		"epoch later": func(d document) { d.sub("epoch")["atMost"] = d.sub("epoch")["atMost"].(float64) + 1 },
		"PCR less":    func(d document) { delete(d.sub("pcrs"), "7") },
		"use":         func(d document) { d["use"] = "other" },
	} {
		d := read(t, slot)
		change(d)
		n.T.Log(name)
		n.Refuses(d.slot(t, slot), seal.CauseSlotCorrupt)
	}
	n.Opens(slot, kek)
}

// TestWrapForOthersKeys: a key without the template of a storage root key gets no KEK.
func TestWrapForOthersKeys(t *testing.T) {
	n, p := newPeer(t)
	srk, err := tpm.ParseSRK(p.SRK)
	if err != nil {
		t.Fatal(err)
	}
	point, err := srk.Unique.ECC()
	if err != nil {
		t.Fatal(err)
	}
	offCurve := new(big.Int).Add(new(big.Int).SetBytes(point.Y.Buffer), big.NewInt(1)).FillBytes(make([]byte, 32))
	for name, change := range map[string]func(*tpm2.TPMTPublic){
		"not restricted":        func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false },
		"it can be moved":       func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false },
		"it signs":              func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SignEncrypt = true },
		"made elsewhere":        func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false },
		"under a policy":        func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = make([]byte, 32) },
		"an RSA key":            func(p *tpm2.TPMTPublic) { *p = tpm2.RSASRKTemplate },
		"no point":              func(p *tpm2.TPMTPublic) { p.Unique = tpm2.TPMUPublicID{} },
		"a short point":         func(q *tpm2.TPMTPublic) { setPoint(q, point.X.Buffer[:31], point.Y.Buffer) },
		"a point off the curve": func(q *tpm2.TPMTPublic) { setPoint(q, point.X.Buffer, offCurve) },
	} {
		c := *srk
		change(&c)
		peer := p
		peer.SRK = tpm2.Marshal(c)
		if _, err := tpm.WrapFor(peer, n.KEK(), n.state(), 1); err == nil || !strings.Contains(err.Error(), "wrap for node alpha: storage root key") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range map[string][]byte{"nothing": nil, "left over": append(bytes.Clone(p.SRK), 0), "cut": p.SRK[:len(p.SRK)-1]} {
		if _, err := tpm.ParseSRK(b); err == nil {
			t.Errorf("%s is a storage root key", name)
		}
	}
	weak := n.state()
	weak.Values = map[int][]byte{11: weak.Values[11]}
	_, err = tpm.WrapFor(p, n.KEK(), weak, 1)
	n.Want(err, seal.CauseBootState, "node alpha", "PCR 11 alone")
}

func setPoint(p *tpm2.TPMTPublic, x, y []byte) {
	p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y}})
}

// TestImportInMemory: a KEK that was wrapped for another node, and imported by it, is
// only in its locked memory.
func TestImportInMemory(t *testing.T) {
	n, p := newPeer(t)
	kek := n.KEK()
	watch := sealtest.NewWatch()
	watch.Add("KEK", kek)
	slot := n.wrapFor(p, kek, n.state())
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("after WrapFor: %q", found)
	}
	got, err := n.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	watch.Add("KEK, unwrapped", got)
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("after Unwrap: %q", found)
	}
}
