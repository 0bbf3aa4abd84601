package vault

import (
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/site"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// Two of two over a TPM and a real Vault.

// TestTwoOfTwoConformance runs the wrappers' common suite, with another key and the
// same TPM, and with another TPM and the same key.
func TestTwoOfTwoConformance(t *testing.T) {
	s := newServer(t)
	s.must("transit/keys/other", map[string]any{})
	c := s.config()
	c.Auth = tokenAuth(s)
	other := c
	other.Key = "other"
	first, _ := site.NewTPM(t)
	elsewhere, _ := site.NewTPM(t)
	w, o := s.wrapper(c), s.wrapper(other)
	for name, h := range map[string]sealtest.Harness{
		"another key": {Other: site.Pair(first, o), OtherCause: seal.CauseNoSlot},
		"another TPM": {Other: site.Pair(elsewhere, w), OtherCause: seal.CauseOtherTPM},
	} {
		t.Run(name, func(t *testing.T) {
			h.Wrapper, h.Stride = site.Pair(first, w), 11
			sealtest.Run(t, func(*testing.T) sealtest.Harness { return h })
		})
	}
}

// TestTwoOfTwoRefuses: the slot does not open without either wrapper. The error says
// which wrapper refuses, and repeats no share, KEK or credential.
func TestTwoOfTwoRefuses(t *testing.T) {
	t.Parallel()
	f := newScene(t, tokenAuth)
	first, machine := site.NewTPM(t)
	w := site.Pair(first, f.w)
	slot, err := w.Wrap(t.Context(), f.kek)
	if err != nil {
		t.Fatal(err)
	}
	secrets := site.Secrets(t, w, slot)
	maps.Copy(secrets, secretsOf(t, f))
	refuses := func(cause seal.Cause, says string) {
		t.Helper()
		got, err := w.Unwrap(t.Context(), slot)
		if err == nil {
			got.Close()
		}
		checkError(t, "Unwrap", err, cause, nil, says)
		site.FindIn(t, "the error", fmt.Sprintf("%v %+v %#v", err, err, err), secrets)
	}
	was := machine.Current()
	other := was
	other.Kernel = "6.1.0-666-amd64"
	machine.Reboot(other)
	refuses(seal.CauseBootState, "did not boot as it did")
	machine.Reboot(was)
	f.gate.shut()
	refuses(seal.CauseUnavailable, "connection refused")
	f.gate.open()
	f.write("token", []byte("hvs.of-another-server"))
	refuses(seal.CauseCredentials, "the token is expired, revoked or of another server")
	tokenAuth(f.server)
	got, err := w.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if !got.Equal(f.kek) {
		t.Error("it opens to another KEK")
	}
}

// TestNothingLeftOfTwoOfTwo: 10,000 wraps with both wrappers leave nothing behind.
func TestNothingLeftOfTwoOfTwo(t *testing.T) {
	s := newServer(t)
	c := s.config()
	c.Auth, c.Timeout = tokenAuth(s), time.Minute
	first, _ := site.NewTPM(t)
	site.NothingLeft(t, site.Pair(first, s.wrapper(c)))
}

// newTwoOfTwo is a node whose TPM and Vault must open the keyring together.
func newTwoOfTwo(t *testing.T) *host {
	t.Helper()
	f := newScene(t, tokenAuth)
	return &host{site.New(t, node.Setup{Settings: settings(f, "[tpm-and-vault]"), Init: []string{"--no-recovery", "--accept-data-loss"}}), f}
}

const kindBoth = "tpm-and-vault"

// TestServeTwoOfTwo: the life of a node that needs both wrappers: rotations, an update,
// and a refusal by either wrapper.
func TestServeTwoOfTwo(t *testing.T) {
	t.Parallel()
	s := newTwoOfTwo(t)
	s.Do("status", "tpm-and-vault", "(opens now)")
	s.Do("rotate")
	s.Do("slot test", "opens")
	s.EncryptSeed()

	t.Log("Vault is away")
	before := string(s.Stored())
	s.scene.gate.shut()
	s.Refuse("rotate", "wrap the new KEK for the tpm-and-vault slot", "connection refused")
	s.Refuse("rotate --skip-slot tpm-and-vault", "no slot would be left")
	s.Refuse("reseal", "connection refused")
	s.Refuse("slot test", "DOES NOT OPEN", "connection refused")
	s.Decrypts()
	s.Restart()
	s.WaitSays(http.StatusServiceUnavailable, "locked: backend-unavailable", "connection refused", "start the server, or correct vault.address")
	s.RefusesCalls("backend-unavailable", "connection refused")
	if before != string(s.Stored()) {
		t.Error("the keyring was changed")
	}
	s.scene.gate.open()
	s.WaitSays(http.StatusOK, "ok")
	s.Decrypts()

	t.Log("the TPM refuses, and Vault answers")
	was, other := s.Kernel, s.Kernel
	other.Kernel = "6.1.0-666-amd64"
	s.Serving.Stop()
	s.Reboot(other)
	s.Serve()
	s.WaitLocked("PCR 4")
	s.RefusesCalls("boot-state-not-authorized")
	s.Refuse("rotate", "the machine booted with another kernel")
	s.Serving.Stop()
	s.Reboot(was)

	t.Log("an update")
	s.Serve()
	s.WaitOpen()
	next := was
	next.Kernel = "6.13.1"
	files, err := next.Files()
	if err != nil {
		t.Fatal(err)
	}
	if err := files.Write(s.Path("next")); err != nil {
		t.Fatal(err)
	}
	s.Do("reseal --next-uki " + s.Path("next/uki.efi"))
	s.Do("rotate")
	s.Serving.Stop()
	s.Reboot(next)
	s.Serve()
	s.WaitOpen()
	s.Decrypts()
	// The slot of the earlier boot disappears a moment after the opening.
	node.Eventually(t, 2*time.Minute, "every slot opens", func() error {
		_, err := s.Try("slot", "test")
		return err
	})
	s.Do("reseal")
	s.Serving.Stop()
	s.Reboot(was)
	s.Serve()
	s.WaitSays(http.StatusServiceUnavailable, "locked: boot-state-not-authorized")
	s.Serving.Stop()
	s.Reboot(next)
	s.Serve()
	s.WaitOpen()
	s.Decrypts()

	slot := s.SlotOf(kindBoth)
	secrets := site.Secrets(t, site.Pair(site.TPM(t, s.Machine, slot.Node), s.scene.w), slot)
	maps.Copy(secrets, secretsOf(t, s.scene))
	s.SaidNone(secrets)
}

// TestServeTwoOfTwoStands: kleidi adds no slot that breaks two-of-two unless the operator
// says so.
func TestServeTwoOfTwoStands(t *testing.T) {
	t.Parallel()
	s := newTwoOfTwo(t)
	before := string(s.Stored())
	for _, command := range []string{"slot add vault", "slot add recovery --recipient " + recipient} {
		s.Refuse(command, "would open the KEK alone, and break two of two", "--break-two-of-two")
	}
	s.Refuse("slot remove tpm-and-vault", "it is the last slot that can open the keyring")
	if before != string(s.Stored()) {
		t.Error("the keyring was changed")
	}
	s.Do("slot add recovery --break-two-of-two --recipient "+recipient, "the KEK is wrapped by recovery as well")
	s.Do("slot add vault --break-two-of-two", "it opens nothing at start until unlock.order names vault")
	s.Do("slot list", "recovery", "vault", kindBoth)
	s.Do("slot remove vault", "run kleidi rotate")
	s.Do("rotate")
	s.Decrypts()

	// With only one of the two in the order, no slot belongs to it.
	s.Serving.Stop()
	s.Configure(strings.Replace(settings(s.scene, "[tpm]"), "[tpm]", "[tpm, vault]", 1))
	s.Serve()
	s.WaitSays(http.StatusServiceUnavailable, "locked: no-slot")
}

// recipient belongs to somebody who keeps the identity elsewhere.
const recipient = "age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg"
