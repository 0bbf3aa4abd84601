package replica

import "time"

// Anyone who can write to the store makes every node start a round with each write. A node
// makes burst rounds at once, which is more than a rotation needs, and after that at most
// perSecond rounds in a second. This bounds its log, its load and its requests to the API.
const (
	burst     = 200
	perSecond = 4
)

// pace says when the next round may begin.
type pace struct {
	left float64 // rounds that may begin at once; below zero, rounds that wait
	at   time.Time
}

// wait counts a round, and returns how long to wait before it.
func (p *pace) wait(now time.Time) time.Duration {
	if p.at.IsZero() {
		p.left = burst
	} else {
		p.left = min(burst, p.left+perSecond*now.Sub(p.at).Seconds())
	}
	p.at = now
	p.left--
	return max(0, time.Duration(-p.left*float64(time.Second)/perSecond))
}
