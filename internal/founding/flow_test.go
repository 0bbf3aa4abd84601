package founding

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// exists reports whether the machine has a keyring, and whether it has an anchor.
func exists(t *testing.T, n *node.Node) (keyring, anchor bool) {
	t.Helper()
	_, err := os.Stat(n.Config.Keyring())
	a, anchorErr := n.Anchor.Load(t.Context())
	if anchorErr != nil {
		t.Fatal(anchorErr)
	}
	return err == nil, a != nil
}

func refuses(t *testing.T, what string, err error, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v; want %q", what, err, part)
		}
	}
}

// TestInit: the keyring opens with what unlock.order names, the anchor agrees, and the
// record knows every slot. A second init refuses, and changes nothing.
func TestInit(t *testing.T) {
	n := nodetest.New(t, nodetest.NewPlugin(t).Opens)
	_, recipient := nodetest.Identity(t)
	var steps []string
	r, err := Init(t.Context(), n, InitOptions{Recipients: []string{recipient}, Progress: func(s string) { steps = append(steps, s) }})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(steps, []string{"wrapping a fresh KEK by kms-plugin", "saving the keyring to " + n.Config.Keyring()}) {
		t.Errorf("%q", steps)
	}
	if r.Node != "cp-1" || r.EK != "" || r.PKCS11 != nil || len(r.Slots) != 2 || !strings.HasPrefix(r.Slots[0], "kms-plugin: ") {
		t.Errorf("%+v", r)
	}
	if b, err := os.ReadFile(n.Config.SlotRecord()); err != nil || !bytes.Contains(b, []byte(r.ClusterID.String())) {
		t.Errorf("the record of the slots: %s, %v", b, err)
	}
	if err := n.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	k, err := n.Unlocker.Keyring()
	if err != nil || k.CurrentID() != r.KeyID || k.ClusterID() != r.ClusterID {
		t.Fatalf("%+v, %v", r, err)
	}
	if a, err := n.Anchor.Load(t.Context()); err != nil || a.KeyID != r.KeyID {
		t.Errorf("%+v, %v", a, err)
	}
	if c := n.Slots.Outside(t.Context(), k.ClusterID().String(), k.Slots()); !c.None() {
		t.Errorf("not on record: %q", c.Describe())
	}
	before, err := os.ReadFile(n.Config.Keyring())
	if err != nil {
		t.Fatal(err)
	}
	_, err = Init(t.Context(), n, InitOptions{Recipients: []string{recipient}})
	refuses(t, "twice", err, "init never replaces a keyring")
	if after, err := os.ReadFile(n.Config.Keyring()); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the second init has changed the keyring, %v", err)
	}
}

// TestNoRecovery: without a recovery slot nobody is asked, and there is none.
func TestNoRecovery(t *testing.T) {
	n := nodetest.New(t, nodetest.NewPlugin(t).Opens)
	if r, err := Init(t.Context(), n, InitOptions{NoRecovery: true}); err != nil || len(r.Slots) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestNothingIsLeft: an init that fails before its last steps leaves neither keyring nor
// anchor, and the next one succeeds.
func TestNothingIsLeft(t *testing.T) {
	p := nodetest.NewPlugin(t)
	n := nodetest.New(t, p.Opens)
	_, recipient := nodetest.Identity(t)
	check := func(what string, err error, parts ...string) {
		t.Helper()
		refuses(t, what, err, parts...)
		if keyring, anchor := exists(t, n); keyring || anchor {
			t.Errorf("%s: a keyring: %v, an anchor: %v", what, keyring, anchor)
		}
	}
	_, err := Init(t.Context(), n, InitOptions{})
	check("nobody keeps the identity", err, "give --recovery-recipient")
	_, err = Init(t.Context(), n, InitOptions{Prompter: &person{}})
	check("the identity is not typed again", err, "nothing was made, run kleidi init again")
	p.Stop()
	_, err = Init(t.Context(), n, InitOptions{Recipients: []string{recipient}})
	if check("no plugin", err, "kms"); seal.CauseOf(err) != seal.CauseUnavailable {
		t.Errorf("%v", err)
	}
	p.Start()
	n.Remote = &node.RemoteGate{}
	_, err = Init(t.Context(), n, InitOptions{Recipients: []string{recipient}})
	check("a verifier", err, "tpm.verifier is set, and no verifier knows this cluster yet")
	n.Remote = nil
	if _, err := Init(t.Context(), n, InitOptions{Recipients: []string{recipient}}); err != nil {
		t.Error(err)
	}
}

// TestAnchorComesFirst: if the keyring can't be saved, only the anchor of its first revision
// stays, and the next init goes on from there.
func TestAnchorComesFirst(t *testing.T) {
	n := nodetest.New(t, nodetest.NewPlugin(t).Opens)
	if err := n.AcquireState(); err != nil {
		t.Fatal(err)
	}
	kek, err := n.Memory.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	slot, err := n.KMSPlugin.Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(n.Config.Keyring(), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := saveFirst(t.Context(), n, kek, []seal.Slot{slot}, "", InitOptions{Progress: func(string) {}}); err == nil {
		t.Fatal("a keyring was saved in the place of a folder")
	}
	if a, err := n.Anchor.Load(t.Context()); err != nil || a == nil || a.Revision != 1 {
		t.Errorf("%+v, %v", a, err)
	}
	if err := os.Remove(n.Config.Keyring()); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(t.Context(), n, InitOptions{NoRecovery: true}); err != nil {
		t.Errorf("the next init: %v", err)
	}
}

// TestInitOnTPM: the result names the TPM. The boot policy is recorded if its file does not
// exist, and an existing one judges the boot.
func TestInitOnTPM(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	policy := filepath.Join(t.TempDir(), "bootpolicy.yaml")
	n := nodetest.New(t, nodetest.OnTPM(m), func(c *config.Config) { c.TPM.BootPolicy = policy })
	_, recipient := nodetest.Identity(t)
	r, err := Init(t.Context(), n, InitOptions{Recipients: []string{recipient}})
	if err != nil {
		t.Fatal(err)
	}
	if r.EK == "" || !strings.HasPrefix(r.Slots[0], "tpm: ") {
		t.Errorf("%+v", r)
	}
	recorded, err := os.ReadFile(policy)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bootpolicy.Parse(recorded); err != nil {
		t.Errorf("the recorded policy: %v", err)
	}
	if _, err := Init(t.Context(), nodetest.New(t, nodetest.OnTPM(m), func(c *config.Config) { c.TPM.BootPolicy = policy }), InitOptions{Recipients: []string{recipient}}); err != nil {
		t.Errorf("with the recorded policy: %v", err)
	}
	other := simboot.Baseline(simboot.UKI)
	other.Kernel = "6.13.1"
	m.Reboot(other)
	n = nodetest.New(t, nodetest.OnTPM(m), func(c *config.Config) { c.TPM.BootPolicy = policy })
	if _, err := Init(t.Context(), n, InitOptions{Recipients: []string{recipient}}); err == nil {
		t.Error("a boot that the policy refuses has a keyring")
	}
	if now, err := os.ReadFile(policy); err != nil || !bytes.Equal(now, recorded) {
		t.Errorf("the policy has changed, %v", err)
	}
	if _, err := os.Stat(n.Config.Keyring()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a refused init leaves a keyring: %v", err)
	}
}

// TestPINFile: a PIN's file is made once, for its owner alone. A file with another PIN stays.
func TestPINFile(t *testing.T) {
	mem := seal.Memory{}
	pin, err := mem.Take([]byte("123456"))
	if err != nil {
		t.Fatal(err)
	}
	i := &Import{pin: pin}
	defer i.Close()
	i.Token.PINFile = filepath.Join(t.TempDir(), "pin")
	if err := i.samePIN(mem); err != nil {
		t.Errorf("without a file: %v", err)
	}
	for range 2 {
		if err := i.keepPIN(); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(i.Token.PINFile)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	for content, same := range map[string]bool{"123456": true, "123456\n": true, "123456\r\nmore": true, "654321": false, "": false, "\n": false} {
		if err := os.WriteFile(i.Token.PINFile, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		err := i.samePIN(mem)
		if (err == nil) != same || err != nil && !strings.Contains(err.Error(), i.Token.PINFile+" exists already, and holds a different PIN") {
			t.Errorf("%q: %v", content, err)
		}
	}
}

// TestImportOpens: the imported token opens at start if unlock.order names it, alone or
// with the TPM.
func TestImportOpens(t *testing.T) {
	for kind, opens := range map[string]bool{seal.TypePKCS11: true, seal.TypeTPMAndPKCS11: true, seal.TypeTPM: false, seal.TypeTPMAndVault: false} {
		if (&Import{}).Opens([]string{kind}) != opens {
			t.Errorf("%s: %v", kind, !opens)
		}
	}
}
