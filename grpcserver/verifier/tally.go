package verifier

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

// maxTallied bounds the kinds of refusals that are told apart in one interval.
const maxTallied = 64

// tally sums up the refusals of peers that have proven nothing. Anybody can cause any
// number of them, so they are counted by kind and written once per interval: a line and
// a flush for each would let a stranger fill the disk, and slow down the nodes.
type tally struct {
	write func([]*Verdict) error

	mu    sync.Mutex
	kinds map[kind]*Verdict
	timer *time.Timer // runs while there is something to write
}

// kind tells refusals apart.
type kind struct {
	check string
	node  string // the claimed name where it is registered, else ""
	from  netip.Prefix
}

// add counts a refusal, and reports whether it is the first of its kind in this interval.
func (t *tally) add(k kind, v *Verdict) (first bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kinds == nil {
		t.kinds = map[kind]*Verdict{}
	}
	if t.timer == nil {
		t.timer = time.AfterFunc(tallyInterval, t.flush)
	}
	if _, ok := t.kinds[k]; !ok && len(t.kinds) >= maxTallied {
		k = kind{check: k.check} // there are as many as there are checks
	}
	sum, ok := t.kinds[k]
	if !ok {
		t.kinds[k] = v
		v.Count, v.Since = 1, v.Time
		return true
	}
	sum.Count++
	sum.Time = v.Time
	if sum.Peer = "several"; k.from.IsValid() {
		sum.Peer = peerName(k.from)
	}
	return false
}

func peerName(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// flush writes what was counted, the oldest first. What can't be written stays for the
// next interval.
func (t *tally) flush() {
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
	if t.write(sums) != nil {
		t.timer = time.AfterFunc(tallyInterval, t.flush)
		return
	}
	t.kinds = nil
}
