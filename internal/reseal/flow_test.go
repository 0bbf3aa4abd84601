package reseal_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
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
	"github.com/beezy-dev/kleidi/tpm/predict"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// founded returns a node with an open keyring, which is sealed to the machine's boot.
func founded(t *testing.T, m *tpmtest.Machine, amend ...func(*config.Config)) *node.Node {
	t.Helper()
	n := nodetest.New(t, append(amend, nodetest.OnTPM(m))...)
	foundingtest.FoundOpen(t, n)
	return n
}

func unlock(t *testing.T, n *node.Node) {
	t.Helper()
	if err := n.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// restarted returns the node as kleidi has it after a start, with the keyring open.
func restarted(t *testing.T, n *node.Node) *node.Node {
	t.Helper()
	again := nodetest.Restarted(t, n)
	unlock(t, again)
	return again
}

// uses returns what each open slot of the TPM is for.
func uses(n *node.Node) (all []string) {
	for _, s := range n.OpenSlots() {
		if s.Type == seal.TypeTPM {
			all = append(all, n.View.Use(s))
		}
	}
	return all
}

// opens reports whether the TPM still opens a slot.
func opens(t *testing.T, n *node.Node, s seal.Slot) bool {
	t.Helper()
	kek, err := n.TPM.Unwrap(t.Context(), s)
	if err != nil {
		return false
	}
	kek.Close()
	return true
}

// toKernel is the change of an update to a kernel, and the boot after it.
func toKernel(t *testing.T, version string) (simboot.Boot, predict.Change) {
	t.Helper()
	next := simboot.Baseline(simboot.UKI)
	next.Kernel = version
	f, err := next.Files()
	if err != nil {
		t.Fatal(err)
	}
	return next, predict.Change{Next: predict.Files{UKI: f.UKI}}
}

// sealing is the seal of ToNext to its prediction.
func sealing(ctx context.Context, n *node.Node) func(*admin.BootState) (admin.KeyringState, error) {
	return func(b *admin.BootState) (admin.KeyringState, error) {
		return reseal.Next(ctx, n, admin.ResealRequest{Next: b})
	}
}

func has(changes []string, part string) bool {
	return slices.ContainsFunc(changes, func(c string) bool { return strings.Contains(c, part) })
}

// TestPresent: a reseal makes one slot for the running boot. The former one no longer
// opens, not even a kept copy. Slots for next boots stay, unless they are to be dropped.
func TestPresent(t *testing.T) {
	n := founded(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)))
	_, change := toKernel(t, "6.13.1")
	if _, err := reseal.ToNext(t.Context(), n, change, sealing(t.Context(), n)); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		drop bool
		uses []string
	}{{false, []string{"present", "next"}}, {true, []string{"present"}}} {
		former := n.OpenSlots()[slices.IndexFunc(n.OpenSlots(), func(s seal.Slot) bool { return n.View.Use(s) == "present" })]
		if !opens(t, n, former) {
			t.Fatal("the slot does not open before it is revoked")
		}
		s, err := reseal.Present(t.Context(), n, admin.ResealRequest{DropNext: row.drop})
		if err != nil {
			t.Fatal(err)
		}
		if s.Former != "" || !has(s.Changes, "the KEK is sealed to ") || !has(s.Changes, reseal.EarlierEpoch) {
			t.Errorf("%+v", s)
		}
		if got := uses(n); !slices.Equal(got, row.uses) {
			t.Errorf("drop %v: slots for %q, want %q", row.drop, got, row.uses)
		}
		if opens(t, n, former) {
			t.Error("a copy of the former slot opens")
		}
	}
}

// TestNext: an update adds a slot, once. No more than MaxNext are kept, and the oldest goes
// first. A clean-up does nothing until such a boot has opened the keyring; then it revokes
// the boot before the update.
func TestNext(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	n := founded(t, m)
	former := n.OpenSlots()[0]
	var next simboot.Boot
	for i := range slotview.MaxNext + 1 {
		boot, change := toKernel(t, "6.13."+string(rune('1'+i)))
		r, err := reseal.ToNext(t.Context(), n, change, sealing(t.Context(), n))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(r.Moved, []int{4, 11}) || !has(r.Keyring.Changes, " as well") {
			t.Errorf("%d: %+v", i, r)
		}
		if dropped := has(r.Keyring.Changes, "the oldest slot for a next boot"); dropped != (i == slotview.MaxNext) {
			t.Errorf("%d: dropped: %v", i, dropped)
		}
		next = boot
		revision := r.Keyring.Revision
		if r, err = reseal.ToNext(t.Context(), n, change, sealing(t.Context(), n)); err != nil || r.Keyring.Revision != revision || !has(r.Keyring.Changes, "already") {
			t.Errorf("%d, again: %+v, %v", i, r, err)
		}
	}
	if got := uses(n); len(got) != 1+slotview.MaxNext {
		t.Errorf("slots for %q", got)
	}
	revision := func() uint64 {
		k, err := n.Unlocker.Keyring()
		if err != nil {
			t.Fatal(err)
		}
		return k.Revision()
	}
	before := revision()
	if err := reseal.Tidy(t.Context(), n); err != nil || revision() != before {
		t.Errorf("a clean-up before the update: %v, revision %d, was %d", err, revision(), before)
	}
	m.Reboot(next)
	n = restarted(t, n)
	if err := reseal.Tidy(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	if got := uses(n); !slices.Equal(got, []string{"present"}) {
		t.Errorf("after the update: slots for %q", got)
	}
	m.Reboot(simboot.Baseline(simboot.UKI))
	if opens(t, n, former) {
		t.Error("the boot before the update still opens")
	}
}

// TestNextRefused: a dry run seals nothing. A bank that kleidi does not know is refused.
func TestNextRefused(t *testing.T) {
	n := founded(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)))
	_, change := toKernel(t, "6.13.1")
	r, err := reseal.ToNext(t.Context(), n, change, nil)
	if err != nil || r.Keyring != nil || len(uses(n)) != 1 || len(r.PCRs) == 0 {
		t.Errorf("a dry run: %+v, %v", r, err)
	}
	if _, err := reseal.Next(t.Context(), n, admin.ResealRequest{Next: &admin.BootState{Bank: "md5"}}); err == nil || !strings.HasPrefix(err.Error(), "reseal: ") || len(uses(n)) != 1 {
		t.Errorf("%v", err)
	}
}

// TestBootPolicyFollows: the boot policy allows the next boot before the KEK is sealed to
// it, and no longer does if that fails. After the last slot for a boot is gone, narrow
// removes the boot from the policy, unless it only lists what it would remove.
func TestBootPolicyFollows(t *testing.T) {
	policy := filepath.Join(t.TempDir(), "bootpolicy.yaml")
	n := founded(t, tpmtest.New(t, simboot.Baseline(simboot.UKI)), func(c *config.Config) { c.TPM.BootPolicy = policy })
	content := func() []byte {
		b, err := os.ReadFile(policy)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	recorded := content() // by init
	_, change := toKernel(t, "6.13.1")
	var during []byte
	broken := errors.New("disk full")
	_, err := reseal.ToNext(t.Context(), n, change, func(*admin.BootState) (admin.KeyringState, error) {
		during = content()
		return admin.KeyringState{}, broken
	})
	if !errors.Is(err, broken) || bytes.Equal(during, recorded) || !bytes.Equal(content(), recorded) {
		t.Errorf("%v; the policy was wider during the seal: %v, is as before: %v", err, !bytes.Equal(during, recorded), bytes.Equal(content(), recorded))
	}
	r, err := reseal.ToNext(t.Context(), n, change, sealing(t.Context(), n))
	if err != nil || !has(r.Keyring.Changes, "allows it as well") || !bytes.Equal(content(), during) {
		t.Fatalf("%+v, %v", r, err)
	}
	if s, err := reseal.NarrowPolicy(t.Context(), n, false); err != nil || len(s.Changes) != 0 || !bytes.Equal(content(), during) {
		t.Errorf("narrow, while a slot is for the next boot: %+v, %v", s, err)
	}
	s, err := reseal.Present(t.Context(), n, admin.ResealRequest{DropNext: true})
	if err != nil || !has(s.Changes, "run kleidi bootpolicy narrow") {
		t.Errorf("%+v, %v", s, err)
	}
	if s, err := reseal.NarrowPolicy(t.Context(), n, true); err != nil || len(s.Changes) == 0 || !bytes.Equal(content(), during) {
		t.Errorf("a dry run: %+v, %v", s, err)
	}
	if s, err := reseal.NarrowPolicy(t.Context(), n, false); err != nil || len(s.Changes) == 0 || !bytes.Equal(content(), recorded) {
		t.Errorf("narrow: %+v, %v", s, err)
	}
}

// TestNoBootPolicy: without a boot policy there is nothing to narrow.
func TestNoBootPolicy(t *testing.T) {
	if _, err := reseal.NarrowPolicy(t.Context(), nodetest.New(t), false); err == nil || !strings.Contains(err.Error(), "set tpm.bootPolicy") {
		t.Error(err)
	}
}

// TestSuspend: one suspension at a time: the second one ends the first, and a reseal ends
// both. The TPM counts the boots: after more of them the suspension does not open, and the
// clean-up removes it.
func TestSuspend(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	n := founded(t, m)
	suspension := func() (s seal.Slot) {
		t.Helper()
		all := slices.DeleteFunc(n.OpenSlots(), func(s seal.Slot) bool { return !n.View.Suspends(s) })
		if len(all) != 1 {
			t.Fatalf("%d suspensions; slots for %q", len(all), uses(n))
		}
		return all[0]
	}
	suspend := func() seal.Slot {
		t.Helper()
		r, err := reseal.Suspend(t.Context(), n, admin.SuspendRequest{Boots: 1})
		if err != nil || !has(r.Changes, "SUSPENDED: ") {
			t.Fatalf("%+v, %v", r, err)
		}
		return suspension()
	}
	first := suspend()
	if !opens(t, n, first) {
		t.Error("the suspension does not open")
	}
	second := suspend()
	if opens(t, n, first) || !opens(t, n, second) {
		t.Error("the second suspension did not take the place of the first")
	}
	if _, err := reseal.Present(t.Context(), n, admin.ResealRequest{}); err != nil || !slices.Equal(uses(n), []string{"present"}) || opens(t, n, second) {
		t.Errorf("a reseal leaves slots for %q, %v", uses(n), err)
	}
	third := suspend()
	m.Reboot(simboot.Baseline(simboot.UKI))
	if !opens(t, n, third) {
		t.Error("the suspension does not open in the first boot")
	}
	if err := reseal.Tidy(t.Context(), n); err != nil || suspension().Node != "cp-1" {
		t.Errorf("a clean-up before it is used up: %v", err)
	}
	m.Reboot(simboot.Baseline(simboot.UKI))
	if opens(t, n, third) {
		t.Error("the suspension opens in the second boot")
	}
	n = restarted(t, n)
	if err := reseal.Tidy(t.Context(), n); err != nil || !slices.Equal(uses(n), []string{"present"}) {
		t.Errorf("after the last boot: slots for %q, %v", uses(n), err)
	}
}

// signerKey returns a private key in a file, and its public key in PEM.
func signerKey(t *testing.T) (path string, public []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return path, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: b})
}

// TestSigned: boot states of one generation get one slot. A later generation revokes the
// earlier one, which can't come back. Revoking the key leaves neither slots nor states.
func TestSigned(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	n := founded(t, m)
	k, err := n.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	key, public := signerKey(t)
	_, stranger := signerKey(t)
	var fingerprint string
	add := func(generation uint64, public []byte) (admin.KeyringState, error) {
		t.Helper()
		s := reseal.Signing{Key: key, Cluster: k.ClusterID().String(), What: "test", Bank: "sha256", Generation: generation, Logs: n.Gate.Logs}
		state, file, err := s.Sign()
		if err != nil {
			t.Fatal(err)
		}
		fingerprint = hex.EncodeToString(state.KeyFingerprint[:])
		return reseal.AddBootStates(t.Context(), n, admin.AddBootStatesRequest{States: file, PublicKey: public})
	}
	if _, err := add(2, stranger); err == nil || !strings.HasPrefix(err.Error(), "add: ") || len(uses(n)) != 1 {
		t.Errorf("with another key: %v, slots for %q", err, uses(n))
	}
	s, err := add(2, public)
	if err != nil || !has(s.Changes, "the KEK is sealed to ") || !slices.Equal(uses(n), []string{"present", "signed"}) {
		t.Fatalf("%+v, %v, slots for %q", s, err, uses(n))
	}
	former := n.OpenSlots()[slices.IndexFunc(n.OpenSlots(), func(s seal.Slot) bool { return n.View.Use(s) == "signed" })]
	if !opens(t, n, former) {
		t.Error("the signed boot state does not open")
	}
	if s, err := add(2, public); err != nil || has(s.Changes, "the KEK is sealed") || len(uses(n)) != 2 {
		t.Errorf("again: %+v, %v, slots for %q", s, err, uses(n))
	}
	if s, err := add(3, public); err != nil || !has(s.Changes, "the earlier generation no longer open") || len(uses(n)) != 2 || opens(t, n, former) {
		t.Errorf("a later generation: %+v, %v, slots for %q", s, err, uses(n))
	}
	if _, err := add(2, public); err == nil || !strings.Contains(err.Error(), "was revoked by generation 3; sign the boot states with --generation 3") {
		t.Errorf("the earlier generation: %v", err)
	}
	if _, err := reseal.RevokeBootStates(t.Context(), n, admin.RevokeBootStatesRequest{Key: "none"}); err == nil || !strings.Contains(err.Error(), "see kleidi bootstate list") || len(uses(n)) != 2 {
		t.Errorf("of no key: %v", err)
	}
	s, err = reseal.RevokeBootStates(t.Context(), n, admin.RevokeBootStatesRequest{Key: strings.ToUpper(fingerprint[:8])})
	if err != nil || !has(s.Changes, "what that key signed no longer opens") || !slices.Equal(uses(n), []string{"present"}) {
		t.Errorf("revoke: %+v, %v, slots for %q", s, err, uses(n))
	}
	if b, err := os.ReadFile(n.Config.BootStates()); err != nil || bytes.Contains(b, []byte(fingerprint)) {
		t.Errorf("the states are still kept: %s, %v", b, err)
	}
}
