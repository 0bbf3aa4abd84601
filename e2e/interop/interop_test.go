package interop

import (
	"bytes"
	"crypto"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	pb "github.com/google/go-tpm-tools/proto/attest"
	"github.com/google/go-tpm-tools/server"
	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

var nonce = bytes.Repeat([]byte{0x5a}, 32)

// pcrs are the PCRs of the firmware, the loaders and the kernel.
var pcrs = []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 14}

// attestation returns kleidi's saved evidence as go-tpm-tools reads it.
func attestation(t *testing.T, e *attest.Evidence) *pb.Attestation {
	t.Helper()
	b, err := e.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	a := &pb.Attestation{}
	if err := proto.Unmarshal(b, a); err != nil {
		t.Fatal(err)
	}
	if len(a.ProtoReflect().GetUnknown()) > 0 || len(a.GetQuotes()) != 1 || len(a.GetQuotes()[0].ProtoReflect().GetUnknown()) > 0 {
		t.Fatalf("go-tpm-tools reads another message: %v", a)
	}
	return a
}

// TestEvidenceOfOthers: kleidi reads the evidence that Google's virtual machines sent to
// go-tpm-tools. Their quotes cover all PCRs, but no log has IMA's measurements (PCR 10),
// which is kleidi's only reason to refuse them.
func TestEvidenceOfOthers(t *testing.T) {
	for name, c := range map[string]struct {
		nonce  []byte
		reason string
	}{
		"gce-cos-85-no-nonce.pb":  {nil, "no nonce was provided"},
		"gce-cos-85-nonce9009.pb": {[]byte{0x90, 0x09}, "no event at all for PCR 10"},
	} {
		b, err := os.ReadFile(filepath.Join("testdata/go-tpm-tools", name))
		if err != nil {
			t.Fatal(err)
		}
		e, err := attest.ParseEvidence(b, crypto.SHA256)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if said, err := e.Nonce(); err != nil || !bytes.Equal(said, c.nonce) {
			t.Errorf("%s: nonce %x, %v", name, said, err)
		}
		_, err = attest.Verify(e, c.nonce, crypto.SHA256, slices.Sorted(maps.Keys(e.Quote.PCRs)))
		if err == nil || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: %v, want %q", name, err, c.reason)
		}
		delete(e.Quote.PCRs, 10)
		if _, err := attest.VerifyLogs(e.FirmwareLog, nil, crypto.SHA256, e.Quote.PCRs); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		e.Quote.PCRs[4] = flipLast(e.Quote.PCRs[4])
		if _, err := attest.VerifyLogs(e.FirmwareLog, nil, crypto.SHA256, e.Quote.PCRs); err == nil {
			t.Errorf("%s: an altered value verifies", name)
		}
	}
}

// options trust only the key that signed the quote.
func options(t *testing.T, q keys.Quote, nonce []byte, loader simboot.Loader) server.VerifyOpts {
	t.Helper()
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](q.AKPublic)
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm2.Pub(*public)
	if err != nil {
		t.Fatal(err)
	}
	opts := server.VerifyOpts{Nonce: nonce, TrustedAKs: []crypto.PublicKey{key}}
	if loader == simboot.GRUB {
		opts.Loader = server.GRUB
	}
	return opts
}

func boots() map[string]simboot.Boot {
	insecure, phased := simboot.Baseline(simboot.UKI), simboot.Baseline(simboot.UKI)
	insecure.SecureBoot = false
	phased.Phases = simboot.AllPhases
	return map[string]simboot.Boot{"UKI": simboot.Baseline(simboot.UKI), "UKI, Secure Boot off": insecure, "UKI, phases": phased,
		"GRUB": simboot.Baseline(simboot.GRUB), "EFI stub": simboot.Baseline(simboot.EFIStub)}
}

func collect(t *testing.T, b simboot.Boot, bank crypto.Hash) *attest.Evidence {
	t.Helper()
	m := tpmtest.New(t, b)
	a := attest.Attester{Device: m.TPM(), Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}}
	e, err := a.Collect(t.Context(), nil, nonce, bank, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// TestOthersAcceptTheEvidence: go-tpm-tools' verifier accepts all evidence that kleidi
// verifies, and finds the same Secure Boot state in it.
func TestOthersAcceptTheEvidence(t *testing.T) {
	for name, b := range boots() {
		for bank := range authpolicy.Banks {
			e := collect(t, b, bank)
			if _, err := attest.Verify(e, nonce, bank, pcrs); err != nil {
				t.Errorf("%s, %v: kleidi: %v", name, bank, err)
			}
			state, err := server.VerifyAttestation(attestation(t, e), options(t, e.Quote, nonce, b.Loader))
			if err != nil {
				t.Errorf("%s, %v: go-tpm-tools: %v", name, bank, err)
				continue
			}
			if got := state.GetSecureBoot().GetEnabled(); got != b.SecureBoot {
				t.Errorf("%s, %v: Secure Boot on: %t, want %t", name, bank, got, b.SecureBoot)
			}
			got, want := strings.TrimRight(state.GetLinuxKernel().GetCommandLine(), "\x00"), "/boot/vmlinuz-"+b.Kernel+" "+b.CommandLine
			if b.Loader == simboot.GRUB && got != want {
				t.Errorf("%s, %v: command line %q, want %q", name, bank, got, want)
			}
		}
	}
}

// TestOthersRefuseWhatKleidiRefuses: both verifiers receive the same forgeries.
func TestOthersRefuseWhatKleidiRefuses(t *testing.T) {
	good := collect(t, simboot.Baseline(simboot.UKI), crypto.SHA256)
	other := collect(t, simboot.Baseline(simboot.UKI), crypto.SHA256)
	editLog := func(e *attest.Evidence, change func(*eventlog.Log)) {
		log, err := eventlog.Parse(e.FirmwareLog)
		if err != nil {
			t.Fatal(err)
		}
		change(log)
		e.FirmwareLog = log.Encode()
	}
	for name, change := range map[string]func(e *attest.Evidence){
		"another machine's signature": func(e *attest.Evidence) { e.Quote.Signature = other.Quote.Signature },
		"another machine's quote": func(e *attest.Evidence) {
			e.Quote.Attest, e.Quote.Signature = other.Quote.Attest, other.Quote.Signature
		},
		"altered statement": func(e *attest.Evidence) { e.Quote.Attest = flipLast(e.Quote.Attest) },
		"altered signature": func(e *attest.Evidence) { e.Quote.Signature = flipLast(e.Quote.Signature) },
		"altered PCR value": func(e *attest.Evidence) {
			e.Quote.PCRs = map[int][]byte{}
			for i, v := range good.Quote.PCRs {
				e.Quote.PCRs[i] = v
			}
			e.Quote.PCRs[7] = flipLast(e.Quote.PCRs[7])
		},
		"an event less": func(e *attest.Evidence) { editLog(e, func(l *eventlog.Log) { l.Events = l.Events[1:] }) },
		"an event twice": func(e *attest.Evidence) {
			editLog(e, func(l *eventlog.Log) { l.Events = slices.Insert(l.Events, 0, l.Events[0]) })
		},
		"reordered": func(e *attest.Evidence) {
			editLog(e, func(l *eventlog.Log) { l.Events[0], l.Events[1] = l.Events[1], l.Events[0] })
		},
	} {
		forged := *good
		change(&forged)
		if _, err := attest.Verify(&forged, nonce, crypto.SHA256, pcrs); err == nil {
			t.Errorf("%s: kleidi accepts it", name)
		}
		if _, err := server.VerifyAttestation(attestation(t, &forged), options(t, good.Quote, nonce, simboot.UKI)); err == nil {
			t.Errorf("%s: go-tpm-tools accepts it", name)
		}
	}
	if _, err := server.VerifyAttestation(attestation(t, good), options(t, good.Quote, nonce[1:], simboot.UKI)); err == nil {
		t.Error("another nonce: go-tpm-tools accepts it")
	}
	if _, err := server.VerifyAttestation(attestation(t, good), options(t, other.Quote, nonce, simboot.UKI)); err == nil {
		t.Error("another key: go-tpm-tools accepts it")
	}
}

func flipLast(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)-1] ^= 1
	return b
}
