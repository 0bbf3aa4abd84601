package attest_test

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootrule"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// The boots that the rule is tried on.
var (
	signedUKI   = simboot.Baseline(simboot.UKI)
	unsignedUKI = with(signedUKI, func(b *simboot.Boot) { b.SecureBoot = false })
	signedGRUB  = simboot.Baseline(simboot.GRUB)
	openGRUB    = with(signedGRUB, func(b *simboot.Boot) { b.SecureBoot = false })
	openStub    = simboot.Baseline(simboot.EFIStub)
	handedOver  = simboot.Baseline(simboot.Direct)
	handedOff   = with(handedOver, func(b *simboot.Boot) { b.SecureBoot = false })
)

func with(b simboot.Boot, change func(*simboot.Boot)) simboot.Boot {
	change(&b)
	return b
}

// way is one way to bind something to a boot.
type way = func(context.Context, *attest.Gate) (tpm.BootState, error)

// attempt is a way, with its result: PCRs, or a refusal that contains says.
type attempt struct {
	name string
	try  way
	want []int
	says string
}

// TestNothingIsBoundToWhatWasNotMeasured: every way to a boot state, or to anything
// else bound to a boot state, follows the rule, on a TPM with that boot. The refusal
// contains says; "" means that there is no refusal.
func TestNothingIsBoundToWhatWasNotMeasured(t *testing.T) {
	const off, idle, noProgram = "Secure Boot is off", "on, and nothing was verified", "boot program (PCR 4 has no image"
	state := func(pcrs ...int) way {
		return func(ctx context.Context, g *attest.Gate) (tpm.BootState, error) {
			g.PCRs = pcrs
			return g.State(ctx)
		}
	}
	anySigned := func(pcrs ...int) way {
		return func(ctx context.Context, g *attest.Gate) (tpm.BootState, error) {
			g.AnySigned = func(bootrule.Binding) {}
			return state(pcrs...)(ctx, g)
		}
	}
	suspended := func(letGo ...int) way {
		return func(ctx context.Context, g *attest.Gate) (tpm.BootState, error) { return g.Suspended(ctx, letGo) }
	}
	signable := func(ctx context.Context, g *attest.Gate) (tpm.BootState, error) { return g.Signable(ctx) }
	holds := func(pcrs ...int) way {
		return func(ctx context.Context, g *attest.Gate) (tpm.BootState, error) {
			return tpm.BootState{}, g.Holds(ctx, "open it", pcrs, "do without")
		}
	}
	next := func(pcrs ...int) way {
		return func(ctx context.Context, g *attest.Gate) (tpm.BootState, error) {
			log, err := g.Logs.Read()
			if err != nil {
				return tpm.BootState{}, err
			}
			return g.Next(log, pcrs)
		}
	}
	for _, boot := range []struct {
		name string
		boot simboot.Boot
		ways []attempt
	}{
		{"UKI", signedUKI, []attempt{
			{"seal", state(), []int{4, 7, 11}, ""},
			{"seal to PCR 7", state(7), nil, "tpm.anySignedBoot: true"},
			{"seal to PCR 0 and 7", state(0, 7), nil, "leave tpm.pcrs out, which then is PCR 4, 7, 11"},
			{"seal to PCR 0 and 11", state(0, 11), nil, "PCR 4 is left out"},
			{"seal to PCR 4 and 11", state(4, 11), nil, "command line (systemd-stub takes another one"},
			{"accept PCR 7", anySigned(7), []int{7}, ""},
			{"accept PCR 0 and 11", anySigned(0, 11), nil, "PCR 7, which shows Secure Boot, is left out"},
			{"next", next(4, 7, 11), []int{4, 7, 11}, ""},
			{"next by PCR 7", next(7), nil, "PCR 4 is left out"},
			{"suspend", suspended(), []int{7}, ""},
			{"suspend PCR 7", suspended(7), []int{4, 9, 11}, ""},
			{"suspend PCR 7 and 4", suspended(4, 7), nil, "would open for every system"},
			{"suspend PCR 9", suspended(9), nil, "--weaken 9"},
			{"sign", signable, []int{7}, ""},
			{"hold by PCR 7", holds(7), nil, ""},
			{"hold by PCR 0", holds(0), nil, "any boot could open it"},
		}},
		{"UKI, Secure Boot off", unsignedUKI, []attempt{
			{"seal", state(), []int{4, 7, 9, 11}, ""},
			{"seal without PCR 9", state(4, 7, 11), nil, off},
			{"accept PCR 7", anySigned(7), nil, off},
			{"next", next(4, 7, 9, 11), []int{4, 7, 9, 11}, ""},
			{"next without PCR 9", next(4, 7, 11), nil, off},
			{"suspend", suspended(), nil, off},
			{"suspend PCR 7", suspended(7), []int{4, 9, 11}, ""},
			{"suspend PCR 9", suspended(9), nil, off},
			{"sign", signable, nil, off},
			{"hold by PCR 7", holds(7), nil, "switch Secure Boot on, or do without"},
			{"hold by PCR 0 and 7", holds(0, 7), nil, off},
			{"hold by the whole boot", holds(4, 7, 9, 11), nil, ""},
		}},
		{"GRUB, Secure Boot off", openGRUB, []attempt{
			{"seal", state(), []int{4, 7, 8, 9, 14}, ""},
			{"seal to PCR 4 and 7", state(4, 7), nil, "PCR 8 is left out"},
			{"suspend", suspended(), nil, off},
			{"suspend PCR 14 and 7", suspended(7, 14), []int{4, 8, 9}, ""},
			{"sign", signable, nil, off},
			{"hold by PCR 4 and 7", holds(4, 7), nil, off},
		}},
		{"GRUB", signedGRUB, []attempt{
			{"sign", signable, []int{7, 14}, ""},
			{"suspend", suspended(), []int{7}, ""},
		}},
		{"EFI stub", openStub, []attempt{{"seal", state(), []int{4, 7, 9}, ""}, {"suspend", suspended(), nil, off}}},
		{"handed to the firmware", handedOver, []attempt{
			{"seal", state(), nil, noProgram},
			{"seal to what it chose", state(4, 7, 9), nil, idle},
			{"accept PCR 7", anySigned(7), nil, idle},
			{"next", next(4, 7, 9), nil, noProgram},
			{"suspend", suspended(), nil, noProgram},
			{"sign", signable, nil, noProgram},
			{"hold by PCR 7", holds(7), nil, idle},
		}},
		{"handed to the firmware, Secure Boot off", handedOff, []attempt{{"seal", state(), nil, noProgram}, {"hold by PCR 7", holds(7), nil, off}}},
	} {
		t.Run(boot.name, func(t *testing.T) {
			n := newNode(t, boot.boot)
			for _, way := range boot.ways {
				g := &attest.Gate{Node: n.gate.Node, Attester: n.gate.Attester, Counter: n.gate.Counter, Bank: n.gate.Bank}
				s, err := way.try(t.Context(), g)
				if got := slices.Sorted(maps.Keys(s.Values)); !slices.Equal(got, way.want) {
					t.Errorf("%s: PCRs %v, want %v", way.name, got, way.want)
				}
				switch {
				case (err == nil) != (way.says == "") || err != nil && !strings.Contains(err.Error(), way.says):
					t.Errorf("%s: %v, want %q", way.name, err, way.says)
				case err != nil && seal.CauseOf(err) != seal.CauseBootState && !strings.Contains(way.says, "--weaken"):
					t.Errorf("%s: cause %q of %v", way.name, seal.CauseOf(err), err)
				}
			}
		})
	}
}

// TestAcceptedSignedBootIsAnnounced: AnySigned is called for each boot state that
// leaves something open, and for no other.
func TestAcceptedSignedBootIsAnnounced(t *testing.T) {
	n := newNode(t, signedUKI)
	var said []string
	n.gate.AnySigned = func(b bootrule.Binding) { said = append(said, b.Describe()) }
	for _, pcrs := range [][]int{{7}, nil, {4, 7}} {
		n.gate.PCRs = pcrs
		if _, err := n.gate.State(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"any boot program, kernel, initrd and command line that Secure Boot's keys let start", "any kernel, initrd and command line that Secure Boot's keys let start"}
	if !slices.Equal(said, want) {
		t.Errorf("announced %q, want %q", said, want)
	}
}

// TestSignedBootsAreOthers: PCR 7 alone admits any other signed boot, on a real TPM.
// That is why an operator must accept it.
func TestSignedBootsAreOthers(t *testing.T) {
	n := newNode(t, signedUKI)
	n.gate.AnySigned, n.gate.PCRs = func(bootrule.Binding) {}, []int{7}
	slot := n.seal()
	n.machine.Reboot(with(signedUKI, func(b *simboot.Boot) { b.CommandLine = "init=/bin/sh" }))
	kek, err := n.wrapper.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	kek.Close()
	n.machine.Reboot(unsignedUKI)
	if _, err := n.wrapper.Unwrap(t.Context(), slot); seal.CauseOf(err) != seal.CauseBootState {
		t.Errorf("without Secure Boot: %v", err)
	}
	if log, err := n.gate.Logs.Read(); err != nil || log.SecureBootState() != eventlog.SecureBootOff {
		t.Errorf("%v", err)
	}
}
