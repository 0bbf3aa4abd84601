package exchange

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// tallyInterval is how often refusals before a proof are written to the audit log.
const tallyInterval = time.Minute

// maxTallied bounds the kinds of refusals that are counted separately in one interval.
const maxTallied = 64

// Tally counts the refusals of peers that have proven nothing. Anybody can cause any
// number of them, so Tally counts them by kind and writes once per interval: with a
// line and a flush for each, a stranger could fill the disk and slow down the nodes.
type Tally struct {
	// Write records verdicts.
	Write func([]*Verdict) error

	mu    sync.Mutex
	kinds map[Kind]*Verdict
	timer *time.Timer // runs while there is something to write
}

// Kind is a kind of refusal.
type Kind struct {
	Check   string
	Finding string // see Verdict
	Node    string // the claimed name if it is known, else ""
	From    netip.Prefix
}

// Add counts a refusal, and reports whether it is the first of its kind in this interval.
func (t *Tally) Add(k Kind, v *Verdict) (first bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kinds == nil {
		t.kinds = map[Kind]*Verdict{}
	}
	if t.timer == nil {
		t.timer = time.AfterFunc(tallyInterval, t.Flush)
	}
	if _, ok := t.kinds[k]; !ok && len(t.kinds) >= maxTallied {
		k = Kind{Check: k.Check} // there are only as many kinds as checks
	}
	sum, ok := t.kinds[k]
	if !ok {
		t.kinds[k] = v
		v.Count, v.Since = 1, v.Time
		return true
	}
	sum.Count++
	sum.Time = v.Time
	if sum.Finding != v.Finding {
		sum.Finding = "" // too many kinds to tell them apart
	}
	if sum.Peer = "several"; k.From.IsValid() {
		sum.Peer = peerName(k.From)
	}
	return false
}

func peerName(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// Flush writes the counts, the oldest first. If writing fails, they stay for the next
// interval.
func (t *Tally) Flush() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.timer != nil {
		t.timer.Stop()
	}
	t.timer = nil
	if len(t.kinds) == 0 {
		return
	}
	sums := slices.SortedFunc(maps.Values(t.kinds), func(a, b *Verdict) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Peer, b.Peer))
	})
	if t.Write(sums) != nil {
		t.timer = time.AfterFunc(tallyInterval, t.Flush)
		return
	}
	t.kinds = nil
}
