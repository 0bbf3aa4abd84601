package simboot_test

import (
	"crypto"
	"os"
	"strings"
	"testing"

	"github.com/google/go-attestation/attest"
	"github.com/google/go-eventlog/extract"
	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestOthersAcceptTheLog: go-attestation replays the log to the TPM's PCRs and
// reads the Secure Boot state out of it; so does our own parser.
func TestOthersAcceptTheLog(t *testing.T) {
	unsigned := simboot.Baseline(simboot.UKI)
	unsigned.SecureBoot = false
	setupMode := unsigned
	setupMode.Keys, setupMode.Dbx = "", ""
	for name, b := range map[string]simboot.Boot{
		"UKI": simboot.Baseline(simboot.UKI), "GRUB": simboot.Baseline(simboot.GRUB), "EFI stub": simboot.Baseline(simboot.EFIStub),
		"UKI, Secure Boot off": unsigned, "UKI, setup mode": setupMode,
	} {
		t.Run(name, func(t *testing.T) {
			m := tpmtest.New(t, b)
			state := secureBootState(t, m)
			if state.Enabled != b.SecureBoot {
				t.Errorf("go-attestation says Secure Boot is on: %t, want %t", state.Enabled, b.SecureBoot)
			}
			if got := len(state.PermittedKeys) == 1; got != (b.Keys != "") {
				t.Errorf("go-attestation finds %d keys in db", len(state.PermittedKeys))
			}
			if got := len(state.ForbiddenHashes) == 2; got != (b.Dbx != "") {
				t.Errorf("go-attestation finds %d hashes in dbx", len(state.ForbiddenHashes))
			}
			if got := len(state.PostSeparatorAuthority) > 0; got != b.SecureBoot {
				t.Errorf("go-attestation finds %d authorities", len(state.PostSeparatorAuthority))
			}
			log := readLog(t, m)
			if on, known := log.SecureBoot(); !known || on != b.SecureBoot {
				t.Errorf("eventlog says Secure Boot is on: %t (known: %t)", on, known)
			}
			if got, want := log.BootType(), eventlog.BootType(b.Loader); got != want {
				t.Errorf("eventlog says the boot type is %s, want %s", got, want)
			}
		})
	}
}

// TestNothingIsVerified: Secure Boot is on in the log of a kernel that was handed to the
// firmware, and the log shows no key that verified anything.
func TestNothingIsVerified(t *testing.T) {
	log := readLog(t, tpmtest.New(t, simboot.Baseline(simboot.Direct)))
	if s := log.SecureBootState(); s != eventlog.SecureBootIdle {
		t.Errorf("Secure Boot is %s, want %s", s, eventlog.SecureBootIdle)
	}
	if m, want := log.Measured(), (eventlog.Measured{Initrd: true}); m != want {
		t.Errorf("measured: %+v, want %+v", m, want)
	}
}

func secureBootState(t *testing.T, m *tpmtest.Machine) *attest.SecurebootState {
	t.Helper()
	raw, err := os.ReadFile(m.EventLog())
	if err != nil {
		t.Fatal(err)
	}
	log, err := attest.ParseEventLog(raw)
	if err != nil {
		t.Fatal(err)
	}
	var pcrs []attest.PCR
	for pcr, value := range readPCRs(t, m.TPM(), crypto.SHA256) {
		pcrs = append(pcrs, attest.PCR{Index: pcr, Digest: value, DigestAlg: crypto.SHA256})
	}
	events, err := log.Verify(pcrs)
	if err != nil {
		t.Fatal(err)
	}
	state, err := attest.ParseSecurebootState(events)
	if err != nil {
		t.Fatal(err)
	}
	return state
}

// TestGoEventlogAcceptsTheLog: go-eventlog, which go-tpm-tools' verifier uses,
// finds a sound boot in every bank that it can read, and with GRUB the kernel's
// command line.
func TestGoEventlogAcceptsTheLog(t *testing.T) {
	for l, loader := range map[simboot.Loader]extract.Bootloader{
		simboot.UKI: extract.UnsupportedLoader, simboot.GRUB: extract.GRUB, simboot.EFIStub: extract.UnsupportedLoader,
	} {
		m := tpmtest.New(t, simboot.Baseline(l))
		raw, err := os.ReadFile(m.EventLog())
		if err != nil {
			t.Fatal(err)
		}
		for _, bank := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
			var registers []register.MR
			for pcr, value := range readPCRs(t, m.TPM(), bank) {
				registers = append(registers, register.PCR{Index: pcr, Digest: value, DigestAlg: bank})
			}
			events, err := tcg.ParseAndReplay(raw, registers, tcg.ParseOpts{})
			if err != nil {
				t.Fatalf("%s, %v: %v", l, bank, err)
			}
			state, err := extract.FirmwareLogState(events, bank, extract.TPMRegisterConfig, extract.Opts{Loader: loader})
			if err != nil {
				t.Errorf("%s, %v: %v", l, bank, err)
				continue
			}
			want := "/boot/vmlinuz-" + m.Current().Kernel + " " + m.Current().CommandLine
			if got := strings.TrimRight(state.GetLinuxKernel().GetCommandLine(), "\x00"); l == simboot.GRUB && got != want {
				t.Errorf("go-eventlog reads the command line %q, want %q", got, want)
			}
		}
	}
}
