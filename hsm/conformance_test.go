//go:build cgo

package hsm

import (
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// TestConformance runs the suite with each mechanism of each module. The other wrapper has
// another token, with a key of the same label.
func TestConformance(t *testing.T) {
	soft := softHSM(t)
	softA, softB := *soft, *soft
	softB.tokens = soft.tokens[1:]
	for _, pair := range [][2]*backend{{&softA, &softB}, {nss(t), nss(t)}} {
		for _, name := range pair[0].only {
			t.Run(pair[0].name+"/"+name, func(t *testing.T) {
				w, other := pair[0].keyFor(t, 0, "kek "+name, name), pair[1].keyFor(t, 0, "kek "+name, name)
				sealtest.Run(t, func(t *testing.T) sealtest.Harness {
					return sealtest.Harness{Wrapper: w, Other: other, Memory: seal.Memory{}}
				})
				if k := must[Key](t)(w.Find(t.Context())); k.Mechanism != name {
					t.Errorf("it uses %s", k.Mechanism)
				}
			})
		}
	}
}
