package pkcs11

import (
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/site"
	"github.com/beezy-dev/kleidi/seal"
)

// The rows that do not apply to NSS.
const tokenRemoved, finalTryLeft = "token removed", "one PIN try left"

// faults are the possible faults of a token, its PIN and its module.
func (k *token) faults(s *site.Site) []site.Fault {
	wrongPINs := func(want string) {
		if got := k.read("tries"); got != want {
			s.T().Errorf("%s wrong PINs were entered, want %s", got, want)
		}
	}
	row := func(name string, cause seal.Cause, break_, mend func(), says ...string) site.Fault {
		return site.Fault{Name: name, Cause: cause, Says: says, Wraps: true, Opens: true, Break: break_, Mend: mend}
	}
	shims := func(name, fault string, says ...string) site.Fault {
		return row(name, seal.CauseUnavailable, func() { k.fault(fault) }, func() { k.fault("") }, says...)
	}

	duringUse := shims("token removed in the middle", "removed", "the token is not there", "connect the token", "tries again by itself")
	duringUse.Each = true
	duringUse.While = func(bool) {
		if k.read("fault") != "gone" {
			s.T().Error("the token was not in use when it was taken out")
		}
	}
	wrongPIN := row("wrong PIN", seal.CauseCredentials, func() { k.write("pin", k.wrong+"\n") }, func() { wrongPINs("2"); k.write("pin", k.pin+"\n") },
		"PIN", "put the right PIN into the file that pkcs11.pinFile names")
	wrongPIN.While = func(open bool) {
		if open {
			wrongPINs("1") // with two commands
		}
	}
	finalTry := row(finalTryLeft, seal.CauseCredentials, func() { k.write("tries", "8") }, func() { wrongPINs("8"); k.tool("--list-objects") },
		"one more wrong PIN locks it", "log in by hand with the right PIN")

	return []site.Fault{
		row("module missing", seal.CauseUnavailable, func() { k.link("") }, func() { k.link(shim) }, "no such file", "name the PKCS#11 module of your token's vendor with pkcs11.module"),
		row("module is none", seal.CauseUnavailable, func() { k.link(k.path("fault")) }, func() { k.link(shim) }, "load the PKCS#11 module", "name the PKCS#11 module of your token's vendor with pkcs11.module"),
		row(tokenRemoved, seal.CauseUnavailable, k.takeOut, k.putBack, "the token is not there", "connect the token", "tries again by itself"),
		duringUse,
		shims("slower than the deadline", "slow", "see whether the token's device or service hangs"),
		shims("device error at login", "trouble", "CKR_DEVICE_ERROR", "check whether the token works; kleidi tries again by itself"),
		shims("session killed each time", "killed", "CKR_SESSION_HANDLE_INVALID", "pkcs11-tool"),
		wrongPIN,
		finalTry,
		row("PIN locked", seal.CauseCredentials, func() { k.write("tries", "9") }, func() { k.write("tries", "0") }, "its user PIN is locked", "have the security officer unlock the user PIN"),
		row("PIN file gone", seal.CauseCredentials, func() { k.ok(os.Remove(k.path("pin"))) }, func() { k.write("pin", k.pin+"\n") }, "no such file", "put the PIN, and nothing else, into that file"),
		row("key deleted", seal.CauseKeyMissing, k.deleteKey, k.putBack, "it has no key that matches", "backup"),
	}
}

// TestFaults: with any fault, an open kleidi goes on and a rotation changes nothing. A
// kleidi that starts is locked and says why, and opens without help after the repair.
func TestFaults(t *testing.T) {
	for name, make_ := range map[string]func(*testing.T) *token{"SoftHSM": newSoftHSM, "NSS": newNSS} {
		t.Run(name, func(t *testing.T) {
			k := make_(t)
			s := newSite(t, k, "[pkcs11]")
			rows := k.faults(s)
			if name == "NSS" { // NSS recreates a missing database, which pkcs11-tool can't open
				rows = slices.DeleteFunc(rows, func(row site.Fault) bool { return row.Name == tokenRemoved || row.Name == finalTryLeft })
			}
			k.testFaults(s, rows)
		})
	}
}

func (k *token) testFaults(s *site.Site, rows []site.Fault) {
	secrets := k.secrets()
	secrets["first KEK"] = k.kek(s.SlotOf(seal.TypePKCS11))
	s.Matrix(seal.TypePKCS11, rows)
	secrets["last KEK"] = k.kek(s.SlotOf(seal.TypePKCS11))
	s.SaidNone(secrets)
}

// TestFaultsOfTwoOfTwo is TestFaults with the TPM and the token together.
func TestFaultsOfTwoOfTwo(t *testing.T) {
	const kind = "tpm-and-pkcs11"
	k := newSoftHSM(t)
	s := newSite(t, k, "["+kind+"]")
	s.Matrix(kind, k.faults(s))
	slot := s.SlotOf(kind)
	secrets := site.Secrets(t, site.Pair(site.TPM(t, s.Machine, slot.Node), k.wrapper()), slot)
	maps.Copy(secrets, k.secrets())
	s.SaidNone(secrets)
}
