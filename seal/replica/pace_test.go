package replica

import (
	"testing"
	"time"
)

// TestPace: rounds that follow each other without a pause are bounded, whoever asks for
// them, and a node that was quiet starts at once.
func TestPace(t *testing.T) {
	p, begin := &pace{}, time.Unix(1, 0)
	now, rounds := begin, 0
	for now.Sub(begin) < time.Minute { // each round is followed by another event
		now = now.Add(p.wait(now) + time.Millisecond)
		rounds++
	}
	if most := burst + 60*perSecond; rounds > most+1 || rounds < most-perSecond {
		t.Errorf("%d rounds in a minute, want about %d", rounds, most)
	}
	now = now.Add(burst / perSecond * time.Second)
	for i := range burst - 1 {
		if wait := p.wait(now); wait != 0 {
			t.Fatalf("after a quiet time, round %d waits for %s", i, wait)
		}
	}
}
