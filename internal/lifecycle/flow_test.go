package lifecycle

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/foundingtest"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// founded returns a node with an open keyring, and its recovery identity.
func founded(t *testing.T, amend ...func(*config.Config)) (n *node.Node, identity []byte) {
	t.Helper()
	n = nodetest.New(t, amend...)
	return n, foundingtest.FoundOpen(t, n)
}

func open(t *testing.T, n *node.Node) *keyring.Keyring {
	t.Helper()
	k, err := n.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func stored(t *testing.T, n *node.Node) []byte {
	t.Helper()
	b, err := os.ReadFile(n.Config.Keyring())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func types(slots []seal.Slot) (all []string) {
	for _, s := range slots {
		all = append(all, s.Type)
	}
	return all
}

func has(changes []string, part string) bool {
	return slices.ContainsFunc(changes, func(c string) bool { return strings.Contains(c, part) })
}

// refuses checks that a refusal says these parts, its hint included.
func refuses(t *testing.T, what string, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no refusal", what)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v; want %q", what, err, part)
		}
	}
}

// decrypts checks that a seed of the key ID decrypts.
func decrypts(t *testing.T, n *node.Node, id seal.KeyID, seed []byte) {
	t.Helper()
	if got, err := n.Unlocker.Decrypt(id, seed); err != nil || string(got) != "seed" {
		t.Errorf("%s no longer decrypts: %q, %v", id, got, err)
	}
}

func encrypted(t *testing.T, n *node.Node) (seal.KeyID, []byte) {
	t.Helper()
	seed, id, err := n.Unlocker.Encrypt([]byte("seed"))
	if err != nil {
		t.Fatal(err)
	}
	return id, seed
}

// TestRotate: a fresh KEK is in the same slots. The former one still decrypts, after a
// restart too.
func TestRotate(t *testing.T) {
	n, _ := founded(t, nodetest.NewPlugin(t).Opens)
	id, seed := encrypted(t, n)
	s, err := Rotate(t.Context(), n, admin.RotateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Former != id || s.CurrentKeyID == id || !has(s.Changes, "kleidi migrate") {
		t.Errorf("%+v", s)
	}
	if got := types(n.OpenSlots()); !slices.Equal(got, []string{seal.TypeKMSPlugin, seal.TypeRecovery}) {
		t.Errorf("slots %q", got)
	}
	decrypts(t, n, id, seed)
	n = nodetest.Restarted(t, n)
	if err := n.Unlocker.Unlock(t.Context()); err != nil || open(t, n).CurrentID() != s.CurrentKeyID {
		t.Fatalf("after a restart: %v", err)
	}
	decrypts(t, n, id, seed)
}

// TestRotateRefused: what a rotation refuses, and what it offers instead. Nothing changes.
func TestRotateRefused(t *testing.T) {
	p := nodetest.NewPlugin(t)
	n, _ := founded(t, p.Opens)
	before := stored(t, n)
	for name, row := range map[string]struct {
		skip []string
		says []string
	}{
		"no such slot":      {[]string{"vault"}, []string{"rotate: --skip-slot: "}},
		"the only opener":   {[]string{"kms-plugin"}, []string{"no slot would be left that can open the keyring", "add another one first"}},
		"the last recovery": {[]string{"recovery"}, []string{slotview.ErrLastRecovery.Error()}},
	} {
		_, err := Rotate(t.Context(), n, admin.RotateRequest{SkipSlots: row.skip})
		refuses(t, name, err, row.says...)
	}
	p.Replace()
	_, err := Rotate(t.Context(), n, admin.RotateRequest{})
	refuses(t, "another key", err, "its key may have been replaced", "kleidi slot rewrap kms-plugin --new-key")
	p.Stop()
	_, err = Rotate(t.Context(), n, admin.RotateRequest{})
	refuses(t, "no plugin", err, "rotate: ")
	if strings.Contains(err.Error(), "--skip-slot") {
		t.Errorf("without the plugin nothing opens, and yet it may be skipped: %v", err)
	}
	if !bytes.Equal(stored(t, n), before) {
		t.Error("the keyring has changed")
	}
}

// TestRotateWithoutRecovery: who accepts the loss gets no recovery slot, and is told that
// it is missing. The next rotation leaves it out as well.
func TestRotateWithoutRecovery(t *testing.T) {
	n, _ := founded(t, nodetest.NewPlugin(t).Opens)
	s, err := Rotate(t.Context(), n, admin.RotateRequest{SkipSlots: []string{"recovery"}, AcceptDataLoss: true})
	if err != nil || !has(s.Changes, "recovery") {
		t.Errorf("%+v, %v", s, err)
	}
	for range 2 {
		if got := types(n.OpenSlots()); !slices.Equal(got, []string{seal.TypeKMSPlugin, seal.TypeSkipped}) {
			t.Errorf("slots %q", got)
		}
		if _, err := Rotate(t.Context(), n, admin.RotateRequest{}); err != nil {
			t.Error(err)
		}
	}
}

// TestAddMissing: a rotation makes the slot that unlock.order names and the keyring lacks.
// Without the backend it says how to go on, and a skipped one gets a placeholder.
func TestAddMissing(t *testing.T) {
	p := nodetest.NewPlugin(t)
	n := nodetest.New(t, p.Opens)
	k := nodetest.Keyring(t, seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")})
	full, err := addMissing(t.Context(), n, k, nil)
	if err != nil || full == k || !slices.Equal(types(full.Slots()), []string{seal.TypeRecovery, seal.TypeKMSPlugin}) {
		t.Fatalf("%v, %v", full, err)
	}
	defer full.Close()
	if again, err := addMissing(t.Context(), n, full, nil); err != nil || again != full {
		t.Errorf("with nothing missing: %v", err)
	}
	skipped, err := addMissing(t.Context(), n, k, []string{"kms-plugin"})
	if err != nil || !slices.Equal(types(skipped.Slots()), []string{seal.TypeRecovery, seal.TypeSkipped}) {
		t.Fatalf("skipped: %v, %v", skipped, err)
	}
	defer skipped.Close()
	p.Stop()
	_, err = addMissing(t.Context(), n, k, nil)
	refuses(t, "no plugin", err, "unlock.order names kms-plugin, which has no slot yet", "run kleidi rotate --skip-slot kms-plugin")
}

// TestConfirmed: slots that no command on this node made get no fresh KEK until the operator
// confirms each of them.
func TestConfirmed(t *testing.T) {
	n, _ := founded(t, nodetest.NewPlugin(t).Opens)
	_, stranger := nodetest.Identity(t)
	slot, err := recoverySlot(t, n, stranger)
	if err != nil {
		t.Fatal(err)
	}
	changed, err := open(t, n).WithSlots(append(n.OpenSlots(), slot))
	if err != nil {
		t.Fatal(err)
	}
	defer changed.Close()
	if err := os.WriteFile(n.Config.Keyring(), changed.Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Reload(t.Context(), n, admin.ReloadRequest{}); err != nil {
		t.Fatal(err)
	}
	_, err = Rotate(t.Context(), n, admin.RotateRequest{})
	refuses(t, "unconfirmed", err, "the keyring was changed from outside, and nobody has confirmed that", "nothing was changed", slotview.HintOutside)
	_, err = Rotate(t.Context(), n, admin.RotateRequest{Confirmed: []string{"another"}})
	refuses(t, "another one confirmed", err, "nobody has confirmed")
	k := open(t, n)
	ids := n.Slots.Outside(t.Context(), k.ClusterID().String(), k.Slots()).IDs()
	if _, err := Rotate(t.Context(), n, admin.RotateRequest{Confirmed: ids}); err != nil {
		t.Error(err)
	}
}

// TestRecover: after the plugin has lost its key, the recovery identity opens the stored
// keyring. A fresh KEK is wrapped again, and the former one still decrypts.
func TestRecover(t *testing.T) {
	p := nodetest.NewPlugin(t)
	n, identity := founded(t, p.Opens)
	id, seed := encrypted(t, n)
	n = nodetest.Restarted(t, n)
	p.Replace()
	if err := n.Unlocker.Unlock(t.Context()); err == nil {
		t.Fatal("the plugin with another key opens the keyring")
	}
	before := stored(t, n)
	stranger, _ := nodetest.Identity(t)
	_, err := Recover(t.Context(), n, admin.RecoverRequest{Identity: stranger})
	if seal.CauseOf(err) != seal.CauseNoSlot || !bytes.Equal(stored(t, n), before) {
		t.Errorf("with another identity: %v", err)
	}
	refuses(t, "with another identity", err, "recover: ", "kleidi init")
	_, err = Recover(t.Context(), n, admin.RecoverRequest{Identity: []byte("AGE-SECRET-KEY-1"), TrustKeyID: id})
	refuses(t, "no identity", err, "recover: ")
	s, err := Recover(t.Context(), n, admin.RecoverRequest{Identity: identity})
	if err != nil || s.Former != id || s.CurrentKeyID == id || !has(s.Changes, "wrapped by kms-plugin") {
		t.Fatalf("%+v, %v", s, err)
	}
	decrypts(t, n, id, seed)
	n = nodetest.Restarted(t, n)
	if err := n.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatalf("the plugin does not open the recovered keyring: %v", err)
	}
	decrypts(t, n, id, seed)
}

// TestRecoverTrusts: without an anchor, only the operator's word makes a keyring this
// node's, and only for the key ID that it names.
func TestRecoverTrusts(t *testing.T) {
	n, identity := founded(t, nodetest.NewPlugin(t).Opens)
	id, _ := encrypted(t, n)
	n = nodetest.Restarted(t, n)
	if err := os.Remove(n.Config.AnchorPath()); err != nil {
		t.Fatal(err)
	}
	before := stored(t, n)
	_, err := Recover(t.Context(), n, admin.RecoverRequest{Identity: bytes.Clone(identity)})
	refuses(t, "no anchor", err, "no anchor", string(id), "--trust-key-id KEY_ID")
	_, err = Recover(t.Context(), n, admin.RecoverRequest{Identity: bytes.Clone(identity), TrustKeyID: "another"})
	refuses(t, "another key ID", err, "--trust-key-id names another", string(id))
	if seal.CauseOf(err) != seal.CauseAnchor || !bytes.Equal(stored(t, n), before) {
		t.Errorf("%v; the keyring is unchanged: %v", err, bytes.Equal(stored(t, n), before))
	}
	if s, err := Recover(t.Context(), n, admin.RecoverRequest{Identity: identity, TrustKeyID: id}); err != nil || s.Former != id {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestRestore: a backup comes back under a fresh KEK while the anchor vouches for it. A
// backup from before a rotation lacks the anchored KEK, so only the operator's word brings
// it back.
func TestRestore(t *testing.T) {
	n, identity := founded(t, nodetest.NewPlugin(t).Opens)
	id, seed := encrypted(t, n)
	backup := stored(t, n)
	_, err := Restore(t.Context(), n, admin.RestoreRequest{Keyring: []byte("damaged")})
	refuses(t, "damaged", err, "restore: ")
	s, err := Restore(t.Context(), n, admin.RestoreRequest{Keyring: backup})
	if err != nil || s.Former != id || !has(s.Changes, "the keyring is restored; a fresh KEK is current") {
		t.Fatalf("%+v, %v", s, err)
	}
	decrypts(t, n, id, seed)
	later := s.CurrentKeyID
	_, err = Restore(t.Context(), n, admin.RestoreRequest{Keyring: backup})
	refuses(t, "an older backup", err, "this node last trusted key ID "+string(later), "restore a newer keyring")
	before := stored(t, n)
	n = nodetest.Restarted(t, n)
	_, err = Restore(t.Context(), n, admin.RestoreRequest{Keyring: backup, SkipSlots: []string{"kms-plugin"}, TrustKeyID: id})
	refuses(t, "without its opener", err, "no slot would be left")
	if !bytes.Equal(stored(t, n), before) {
		t.Error("a refusal has changed the keyring")
	}
	s, err = Restore(t.Context(), n, admin.RestoreRequest{Keyring: backup, Identity: identity, TrustKeyID: id})
	if err != nil || s.Former != id || s.CurrentKeyID == later {
		t.Fatalf("%+v, %v", s, err)
	}
	decrypts(t, n, id, seed)
	if k := open(t, n); k.Holds(later) {
		t.Error("the restored keyring has a KEK that its backup lacked")
	}
}

// TestVouch: what makes a keyring this node's: the anchor, the open keyring, or the
// operator. The next keyring has no lower revision than any of them.
func TestVouch(t *testing.T) {
	n, _ := founded(t, nodetest.NewPlugin(t).Opens)
	old := stored(t, n)
	id := open(t, n).CurrentID()
	if _, err := Rotate(t.Context(), n, admin.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	current := open(t, n)
	u, err := keyring.Parse(old)
	if err != nil {
		t.Fatal(err)
	}
	backup, _, err := n.Unlocker.OpenUnanchored(t.Context(), u)
	if err != nil {
		t.Fatal(err)
	}
	defer backup.Close()
	for name, row := range map[string]struct {
		k       *keyring.Keyring
		trusted seal.KeyID
		says    string
	}{
		"the open one":             {current, "", ""},
		"the open one, named":      {current, current.CurrentID(), ""},
		"a backup":                 {backup, "", "this node last trusted key ID " + string(current.CurrentID())},
		"a backup, named":          {backup, id, ""},
		"another, which is not it": {backup, current.CurrentID(), "--trust-key-id names " + string(current.CurrentID())},
		"another cluster":          {nodetest.Keyring(t, seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}), "", "this node last trusted key ID"},
	} {
		revision, err := vouch(t.Context(), n, row.k, row.k.CurrentID(), row.trusted)
		switch {
		case row.says != "":
			refuses(t, name, err, row.says)
			if seal.CauseOf(err) != seal.CauseAnchor {
				t.Errorf("%s: cause %q", name, seal.CauseOf(err))
			}
		case err != nil || revision != current.Revision():
			t.Errorf("%s: revision %d, want %d; %v", name, revision, current.Revision(), err)
		}
	}
	// The anchor is lost, and the open keyring still says what this node serves.
	if err := os.Remove(n.Config.AnchorPath()); err != nil {
		t.Fatal(err)
	}
	if revision, err := vouch(t.Context(), n, backup, id, id); err != nil || revision != current.Revision() {
		t.Errorf("without an anchor: revision %d, want %d; %v", revision, current.Revision(), err)
	}
	_, err = vouchByAnchor(t.Context(), n, current, id, "")
	refuses(t, "without an anchor", err, "there is no anchor", "--trust-key-id KEY_ID")
}

// TestSave: the open keyring is stored again after its folder is lost. Verify says what is
// wrong with the stored one, and changes nothing.
func TestSave(t *testing.T) {
	n, _ := founded(t, nodetest.NewPlugin(t).Opens)
	if _, err := Rotate(t.Context(), n, admin.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	s, err := Verify(t.Context(), n, admin.VerifyRequest{})
	if err != nil || s.CurrentKeyID != open(t, n).CurrentID() || !has(s.Changes, "opened: 1 retired KEK") {
		t.Errorf("verify: %+v, %v", s, err)
	}
	whole := stored(t, n)
	if err := os.WriteFile(n.Config.Keyring(), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Verify(t.Context(), n, admin.VerifyRequest{})
	refuses(t, "verify a damaged one", err, "verify: ")
	if s, err = Save(t.Context(), n, admin.SaveRequest{}); err != nil || !bytes.Equal(stored(t, n), whole) || s.Former != "" {
		t.Errorf("save: %+v, %v", s, err)
	}
	if _, err := Verify(t.Context(), n, admin.VerifyRequest{}); err != nil {
		t.Errorf("verify: %v", err)
	}
	_, err = NothingToSave(t.Context(), n, admin.SaveRequest{})
	refuses(t, "without serve", err, "kleidi serve does not run", "kleidi keyring restore")
}

// TestKeyRoles: without serve, the roles are those of the stored keyring.
func TestKeyRoles(t *testing.T) {
	n, _ := founded(t, nodetest.NewPlugin(t).Opens, func(c *config.Config) { c.Admin.Socket = filepath.Join(t.TempDir(), "admin.sock") })
	former := string(open(t, n).CurrentID())
	if _, err := Rotate(t.Context(), n, admin.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	roles, err := KeyRoles(t.Context(), n.Config)
	if err != nil || len(roles) != 2 || roles[former] != roleRetired || CurrentOf(roles) != string(open(t, n).CurrentID()) {
		t.Errorf("%v, %v", roles, err)
	}
	if CurrentOf(map[string]string{former: roleRetired}) != "" {
		t.Error("a retired KEK is current")
	}
	if err := os.Remove(n.Config.Keyring()); err != nil {
		t.Fatal(err)
	}
	if _, err := KeyRoles(t.Context(), n.Config); seal.CauseOf(err) != seal.CauseKeyringMissing {
		t.Errorf("without a keyring: %v", err)
	}
}

// TestNewTPM: only a TPM to which no slot is sealed gets a fresh KEK. The one that opened
// before is told to reseal; a machine without a TPM, to name it in unlock.order.
func TestNewTPM(t *testing.T) {
	if _, err := SealToNewTPM(t.Context(), withoutTPM(t), admin.ResealRequest{}); !errors.Is(err, reseal.ErrNoTPM) {
		t.Errorf("without a TPM: %v", err)
	}
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	n, _ := founded(t, nodetest.OnTPM(m))
	id, seed := encrypted(t, n)
	_, err := SealToNewTPM(t.Context(), n, admin.ResealRequest{})
	refuses(t, "the same TPM", err, "the slots are sealed to this TPM; run kleidi reseal without --new-tpm")
	if err := m.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	s, err := SealToNewTPM(t.Context(), n, admin.ResealRequest{})
	if err != nil || s.Former != id || !has(s.Changes, "a fresh KEK is sealed to this machine's present boot state") {
		t.Fatalf("%+v, %v", s, err)
	}
	n = nodetest.Restarted(t, n)
	if err := n.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	decrypts(t, n, id, seed)
}

func withoutTPM(t *testing.T) *node.Node {
	t.Helper()
	return nodetest.Holding(t, "cp-1", nodetest.Keyring(t, seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}))
}
