package tpm_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// document is a slot's data as JSON.
type document map[string]any

func read(t *testing.T, slot seal.Slot) document {
	t.Helper()
	var d document
	if err := json.Unmarshal(slot.Data, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d document) slot(t *testing.T, like seal.Slot) seal.Slot {
	t.Helper()
	data, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	like.Data = data
	return like
}

func (d document) sub(name string) document { return document(d[name].(map[string]any)) }

// TestTamperedSlot: no change of a field makes the slot open to anything else. Fields
// that are only for display do not affect the opening.
func TestTamperedSlot(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	other := read(t, n.Sealed(kek))
	zeros, ones := strings.Repeat("00", 32), strings.Repeat("11", 32)
	const corrupt, opens = seal.CauseSlotCorrupt, seal.Cause("")
	for name, c := range map[string]struct {
		change func(d document)
		want   seal.Cause
	}{
		"form":                   {func(d document) { d["form"] = "sealed-v2" }, corrupt},
		"no form":                {func(d document) { delete(d, "form") }, corrupt},
		"made":                   {func(d document) { d["made"] = "1999-12-31T23:59:59Z" }, opens},
		"made, no time":          {func(d document) { d["made"] = "yesterday" }, corrupt},
		"SRK":                    {func(d document) { d["srk"] = "000b" + ones }, seal.CauseTPMCleared},
		"no SRK":                 {func(d document) { delete(d, "srk") }, corrupt},
		"SRK, empty":             {func(d document) { d["srk"] = "" }, corrupt},
		"SRK, short":             {func(d document) { d["srk"] = "000b" }, corrupt},
		"SRK, not hexadecimal":   {func(d document) { d["srk"] = "zz" }, corrupt},
		"EK":                     {func(d document) { d["ek"] = "sha256:" + ones }, opens},
		"SRK and EK":             {func(d document) { d["srk"], d["ek"] = "000b"+ones, "sha256:"+ones }, seal.CauseOtherTPM},
		"public, another's":      {func(d document) { d["public"] = other["public"] }, corrupt},
		"private, another's":     {func(d document) { d["private"] = other["private"] }, corrupt},
		"public, empty":          {func(d document) { d["public"] = "" }, corrupt},
		"private, empty":         {func(d document) { d["private"] = "" }, corrupt},
		"public, too much":       {func(d document) { d["public"] = d["public"].(string)[:len(d["public"].(string))-4] + "AAAAAAAA" }, corrupt},
		"no public":              {func(d document) { delete(d, "public") }, corrupt},
		"bank":                   {func(d document) { d["bank"] = "sha384" }, corrupt},
		"bank, unknown":          {func(d document) { d["bank"] = "sha1" }, corrupt},
		"PCR value":              {func(d document) { d.sub("pcrs")["7"] = ones }, corrupt},
		"PCR value, zero":        {func(d document) { d.sub("pcrs")["7"] = zeros }, corrupt},
		"PCR value, short":       {func(d document) { d.sub("pcrs")["7"] = "11" }, corrupt},
		"PCR value, long":        {func(d document) { d.sub("pcrs")["7"] = ones + "11" }, corrupt},
		"PCR more":               {func(d document) { d.sub("pcrs")["0"] = ones }, corrupt},
		"PCR less":               {func(d document) { delete(d.sub("pcrs"), "7") }, corrupt},
		"PCR that is none":       {func(d document) { d.sub("pcrs")["99"] = ones }, corrupt},
		"PCR that is no number":  {func(d document) { d.sub("pcrs")["x"] = ones }, corrupt},
		"no PCRs":                {func(d document) { d["pcrs"] = map[string]any{} }, corrupt},
		"epoch later":            {func(d document) { d.sub("epoch")["atMost"] = d.sub("epoch")["atMost"].(float64) + 1 }, corrupt},
		"epoch, negative":        {func(d document) { d.sub("epoch")["atMost"] = -1 }, corrupt},
		"epoch, any":             {func(d document) { d.sub("epoch")["atMost"] = json.Number("18446744073709551615") }, corrupt},
		"epoch, another index":   {func(d document) { d.sub("epoch")["index"] = nv.DefaultEpochIndex + 1 }, corrupt},
		"no epoch":               {func(d document) { delete(d, "epoch") }, corrupt},
		"boot record":            {func(d document) { d["boot"] = []any{} }, opens},
		"no boot record":         {func(d document) { delete(d, "boot") }, opens},
		"a field more":           {func(d document) { d["module"] = "/tmp/evil.so" }, corrupt},
		"a field in other case":  {func(d document) { d["Form"] = d["form"] }, corrupt},
		"a field more, in epoch": {func(d document) { d.sub("epoch")["atLeast"] = 1 }, corrupt},
	} {
		t.Run(name, func(t *testing.T) {
			d := read(t, slot)
			c.change(d)
			sub := *n.Node
			sub.T = t
			if c.want == opens {
				sub.Opens(d.slot(t, slot), kek)
			} else {
				sub.Refuses(d.slot(t, slot), c.want)
			}
		})
	}
	n.Opens(slot, kek)
}

// TestSlotIsReadStrictly: JSON that a lenient parser would take.
func TestSlotIsReadStrictly(t *testing.T) {
	n := newNode(t)
	slot := n.Sealed(n.KEK())
	data := string(slot.Data)
	for name, tampered := range map[string]string{
		"a field twice":  strings.Replace(data, `"form":`, `"form":"sealed-v1","form":`, 1),
		"left over":      data + "{}",
		"too long":       strings.Replace(data, `"boot":`, `"boot":"`+strings.Repeat("x", seal.MaxSlotData)+`","boot":`, 1),
		"an array":       "[" + data + "]",
		"a comment":      data + "// sealed",
		"a PCR twice":    strings.Replace(data, `"pcrs":{`, `"pcrs":{"4":"11",`, 1),
		"64 KiB of form": strings.Replace(data, `"sealed-v1"`, `"`+strings.Repeat("\u0007", 60<<10)+`"`, 1),
	} {
		if tampered == data {
			t.Fatalf("%s changes nothing", name)
		}
		s := slot
		s.Data = json.RawMessage(tampered)
		if err := n.Refuses(s, seal.CauseSlotCorrupt, "TPM slot is damaged"); err != nil && len(err.Error()) > 400 {
			t.Errorf("%s: the error has %d bytes", name, len(err.Error()))
		}
		if _, err := tpm.DemandOf(s, n.Counter); seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Errorf("%s: DemandOf: %v", name, err)
		}
	}
}

// TestWeakObject: an attacker on this machine seals a key of its own under the right storage
// root key, with other attributes or another authorization policy. kleidi does not even
// load it.
func TestWeakObject(t *testing.T) {
	n := newNode(t)
	slot := n.Sealed(n.KEK())
	d := read(t, slot)
	var genuine struct{ Public []byte }
	if err := json.Unmarshal(slot.Data, &genuine); err != nil {
		t.Fatal(err)
	}
	demand, err := tpm.DemandOf(slot, n.Counter)
	if err != nil {
		t.Fatal(err)
	}
	pcrsOnly, err := authpolicy.Terms{demand.State.PCR}.Digest()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*tpm2.TPMTPublic)
		says   string
	}{
		"a password opens it":   {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.UserWithAuth = true }, "object attributes"},
		"it can be moved":       {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM, p.ObjectAttributes.FixedParent = false, false }, "object attributes"},
		"a password changes it": {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.AdminWithPolicy = false }, "object attributes"},
		"it can be locked out":  {func(p *tpm2.TPMTPublic) { p.ObjectAttributes.NoDA = false }, "object attributes"},
		"no policy":             {func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = nil }, "authorization policy"},
		"PCRs alone":            {func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = pcrsOnly }, "authorization policy"},
		"SHA-384":               {func(p *tpm2.TPMTPublic) { p.NameAlg, p.AuthPolicy.Buffer = tpm2.TPMAlgSHA384, make([]byte, 48) }, "not a sealed object"},
	} {
		public, err := tpm2.Unmarshal[tpm2.TPMTPublic](genuine.Public)
		if err != nil {
			t.Fatal(err)
		}
		public.Unique = tpm2.TPMUPublicID{}
		c.change(public)
		d["public"], d["private"] = createObject(n, *public, seal.KEKSize)
		n.Proxy.Forget()
		n.Refuses(d.slot(t, slot), seal.CauseSlotCorrupt, c.says)
		if len(n.Proxy.Traffic()) != 0 {
			t.Errorf("%s: the TPM was asked", name)
		}
	}
}

// TestObjectOfAnotherSize: an object that opens but is not a KEK.
func TestObjectOfAnotherSize(t *testing.T) {
	n := newNode(t)
	slot := n.Sealed(n.KEK())
	d := read(t, slot)
	var genuine struct{ Public []byte }
	if err := json.Unmarshal(slot.Data, &genuine); err != nil {
		t.Fatal(err)
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](genuine.Public)
	if err != nil {
		t.Fatal(err)
	}
	public.Unique = tpm2.TPMUPublicID{}
	d["public"], d["private"] = createObject(n, *public, seal.KEKSize/2)
	n.Refuses(d.slot(t, slot), seal.CauseSlotCorrupt, "it holds 16 bytes, want 32")
}

// createObject makes the TPM seal this many bytes below its storage root key.
func createObject(n *node, public tpm2.TPMTPublic, size int) (pub, priv []byte) {
	n.Helper()
	n.Must(func(tp transport.TPM) error {
		return keys.WithSRK(tp, keys.Owner{}, nil, func(srk *keys.SRK) error {
			r, err := tpm2.Create{
				ParentHandle: tpm2.AuthHandle{Handle: srk.Handle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)},
				InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
					Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: bytes.Repeat([]byte{0x66}, size)})}},
				InPublic: tpm2.New2B(public),
			}.Execute(tp)
			if err != nil {
				return fmt.Errorf("TPM2_Create: %w", err)
			}
			pub, priv = r.OutPublic.Bytes(), r.OutPrivate.Buffer
			return nil
		})
	})
	return pub, priv
}

// TestConsistentForgery: a key of the attacker, sealed as kleidi seals, opens. The key
// ID and the MAC reveal that it is not the KEK. A key of another size does not open.
func TestConsistentForgery(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	d := read(t, slot)
	d["public"], d["private"] = read(t, n.Sealed(n.KEK()))["public"], read(t, n.Sealed(n.KEK()))["private"]
	n.Refuses(d.slot(t, slot), seal.CauseSlotCorrupt) // the halves of two different keys
	forged := n.Sealed(n.KEK())
	got, err := n.Unwrap(t.Context(), forged)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if got.Equal(kek) {
		t.Error("two KEKs are one")
	}
}

// TestDemandOf: the displayed and quoted demand is the one sealed to.
func TestDemandOf(t *testing.T) {
	n := newNode(t)
	next, err := n.ForNextEpoch(nil).Wrap(t.Context(), n.KEK())
	if err != nil {
		t.Fatal(err)
	}
	now, err := tpm.DemandOf(n.Sealed(n.KEK()), n.Counter)
	if err != nil {
		t.Fatal(err)
	}
	later, err := tpm.DemandOf(next, n.Counter)
	if err != nil {
		t.Fatal(err)
	}
	ek, err := n.Provision(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if later.AtMost != now.AtMost+1 || now.EK != ek || now.Made.IsZero() || len(now.State.Record) == 0 {
		t.Errorf("%+v, %+v", now, later)
	}
	n.Must(func(tp transport.TPM) error {
		values, err := keys.ReadPCRs(tp, now.State.Bank, []int{4, 7, 11})
		for i, v := range values {
			if !bytes.Equal(now.State.Values[i], v) {
				t.Errorf("PCR %d: %x demanded, %x there", i, now.State.Values[i], v)
			}
		}
		return err
	})
	other, err := nv.NewCounter(nv.DefaultEpochIndex+1, keys.Owner{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.DemandOf(next, other); seal.CauseOf(err) != seal.CauseSlotCorrupt || !strings.Contains(err.Error(), "tpm.epochIndex is 0x01804b02") {
		t.Errorf("another epoch index: %v", err)
	}
}

// TestWrapLike: WrapLike seals to the boot state of the slot, not to the present one,
// and refuses any other node's slot.
func TestWrapLike(t *testing.T) {
	n := newNode(t)
	first := n.Sealed(n.KEK())
	was := n.Machine.Current()
	now := was
	now.Phases = "enter-initrd:leave-initrd:sysinit:ready" // PCR 11 has moved on
	n.Machine.Reboot(now)
	kek := n.KEK()
	like, err := n.WrapLike(t.Context(), kek, first)
	if err != nil {
		t.Fatal(err)
	}
	n.Refuses(like, seal.CauseBootState)
	n.Machine.Reboot(was)
	n.Opens(like, kek)
	a, b := read(t, first), read(t, like)
	for _, field := range []string{"srk", "ek", "bank", "pcrs", "epoch", "boot"} {
		if fmt.Sprint(a[field]) != fmt.Sprint(b[field]) {
			t.Errorf("%s: %v, was %v", field, b[field], a[field])
		}
	}
	for name, s := range map[string]seal.Slot{
		"another node's": {Type: seal.TypeTPM, Node: "beta", Data: first.Data},
		"another type's": {Type: seal.TypeRecovery, Node: "alpha", Data: first.Data},
	} {
		if _, err := n.WrapLike(t.Context(), kek, s); !errors.Is(err, seal.ErrNotMine) {
			t.Errorf("%s: %v", name, err)
		}
	}
	damaged := first
	damaged.Data = first.Data[1:]
	_, err = n.WrapLike(t.Context(), kek, damaged)
	n.Want(err, seal.CauseSlotCorrupt)
}
