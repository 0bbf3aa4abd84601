package kill

import (
	"strings"
	"testing"
)

// TestResetKilled kills kleidi reset before each step. The remaining state either opens
// or can be reset again. Once the second reset has ended, no copy of the keyring opens.
func TestResetKilled(t *testing.T) {
	table := newTable(t)
	for name, config := range map[string]string{"reset": "", "reset with the anchor in the TPM": anchorInTPM} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := set(t, verb{name: name, args: "reset --yes one", config: config, prepare: asItIs})
			kills := tally{}
			for _, g := range []group{onDisk, inTPM} {
				for n, killed := 1, true; killed; n++ {
					var steps []step
					if steps, killed = s.resetKilled(victim{g, n}); killed {
						kills[steps[len(steps)-1].series]++
					}
					if t.Failed() {
						t.Fatalf("killed: %v, before %v, after %s", killed, victim{g, n}, trail(steps))
					}
				}
			}
			for _, series := range []string{"flush", "unlink", "TPM"} {
				if kills[series] == 0 {
					t.Errorf("no kill came before a step of series %s", series)
				}
			}
			table.add(name, "command", kills)
		})
	}
}

func (s *scene) resetKilled(who victim) ([]step, bool) {
	s.t.Helper()
	s.restore(s.start)
	p := trace(s.t, s.stateDir(), s.path("output"), who, s.command(s.args))
	ok := p.wait()
	steps, killed := p.reached()
	if !killed && !ok {
		s.t.Errorf("kleidi %s: %s", s.args, p.said())
	}
	if _, err := s.try("keyring verify"); err == nil && !killed {
		s.t.Error("the keyring opens after a reset")
	}
	s.run(s.args)
	for name := range s.state() {
		if name != "ak.json" && name != "audit.log" {
			s.t.Errorf("%s is left in the state folder", name)
		}
	}
	out, err := s.try("keyring restore DIR/backup.json --trust-key-id " + s.history.announced[len(s.history.announced)-1])
	if err == nil || !strings.Contains(err.Error(), "revoked by a later reseal") {
		s.t.Errorf("a kept copy: %s, %v, want that its slot is revoked", out, err)
	}
	return steps, killed
}
