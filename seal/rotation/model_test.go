package rotation_test

import (
	"fmt"
	"hash/maphash"
	"os"
	"slices"
	"strings"
	"testing"
)

// The model is an exhaustive walk, breadth first, over everything that may happen to two
// nodes and a third that joins, in any order: stage, follow, acknowledge, record,
// activate, abort, take over, boot in another way, wrap again, join, remove, prune,
// write, migrate, crash, start, a snapshot of the cluster store and its restore, publish,
// and an intruder who holds the KEKs of a removed node and writes the store. It checks
// the invariants in each state, and that each state has a way to a healed one.
//
// The nodes' decisions are those of the real keyring.Follows, keyring.Precedes and
// rotation.Next, over real keyrings that the real operations made (model_real_test.go).
// The model has its own version of these rules, which it compares with the real ones in
// each state, so that model and code can't diverge. If a test leaves out a rule, the
// model's own version decides, to show that the walk catches the missing rule.

const (
	modelNodes = 3
	// intruders is the KEK that the intruder made.
	intruders = 7
	// madeByIntruder marks a keyring that the intruder wrote.
	madeByIntruder = 9
)

// bits is a set of KEKs or of nodes.
type bits uint8

func bit(i uint8) bits { return 1 << i }

func (b bits) has(i uint8) bool { return b&bit(i) != 0 }

// doc is a shared keyring, reduced to its relevant parts. Two equal docs stand for the
// same bytes.
type doc struct {
	rev, cur, staged uint8
	retired, members bits
	// made is the number of restores of the store before this keyring was made, or
	// madeByIntruder: after a restore the same change makes other bytes.
	made uint8
	// by is the node that drives the rotation, plus one, in walks where the driver
	// matters.
	by uint8
	// moved says that the staged KEK is wrapped for the boot state that a node has moved to.
	moved bool
}

func (d doc) holds(k uint8) bool { return k != 0 && (d.cur == k || d.retired.has(k)) }

// kept is a node's file: the shared keyring, and whether the own section has slots for
// the staged KEK.
type kept struct {
	doc
	sealed bool
}

// machine is one node.
type machine struct {
	member, up bool
	local      kept  // file and anchor
	mem        kept  // open; sealed says that the staged KEK is open
	said       uint8 // the KEK that it announces, 0 for none
	seed       uint8 // the KEK under which its kube-apiserver writes; it follows said after a delay
	left       bits  // KEKs that its kube-apiserver has seen replaced
	moved      bool  // it no longer boots as it did at first
	looking    bool  // it is open, and waits for the store before it announces
	removed    bool  // it is no longer listed, and has its file
	noted      bool  // it keeps the keyring that removed it
}

func (m machine) reads() bits {
	b := m.mem.retired | bit(m.mem.cur)
	if m.mem.sealed && m.mem.staged != 0 {
		b |= bit(m.mem.staged)
	}
	return b
}

// record is a node's record in the store; its MAC is under the KEK that the node
// announces.
type record struct {
	acked, said, anchored, encrypted, rev uint8
	moved                                 bool // wrapped for the boot state that the node has moved to
	counts                                bool // it is younger in the store than the keyring
}

// put puts a keyring into the store. In walks with both pruning and a restore, earlier
// records no longer count. In other walks every record counts, which shows that even less
// than the code demands would be enough.
func (m *model) put(s *state, d doc) {
	s.etcd = d
	for i := range s.r {
		s.r[i].counts = !m.archives
	}
}

type state struct {
	etcd, snap        doc
	snapDB, db        bits // KEKs under which objects are stored
	snapR, r          [modelNodes]record
	snapped           bool
	next              uint8 // the KEK that is made next
	restores, attacks uint8
	n                 [modelNodes]machine
	known             bits  // what the intruder holds
	x                 doc   // the keyring that the intruder had
	broken            uint8 // an invariant that a move broke, see the constants
	joins, removes    uint8
	takeOvers, boots  uint8
	archived          bits // KEKs that were pruned
	lost              bits // pruned KEKs that a restore since then may need again
}

const (
	fine uint8 = iota
	brokenAnchor
	brokenConsent
	brokenAcknowledgement
	brokenHolders
	brokenRemoved
	brokenLook
)

var breaches = map[uint8]string{
	brokenAnchor:          "a node whose anchor the intruder does not know takes the intruder's keyring",
	brokenConsent:         "a node takes a KEK of the intruder's that it never acknowledged",
	brokenAcknowledgement: "a KEK becomes current that a node of the keyring does not hold",
	brokenHolders:         "a machine holds the KEK that the keyring does not list",
	brokenRemoved:         "a node opens at its start that could know of its removal",
	brokenLook:            "a node announces a KEK at its start that the store had left",
}

// rules are the rules that a walk can leave out, by their numbers in the design.
type rules struct {
	changeOutOfStep      bool // 1
	followAnyKEK         bool // 2: whatever KEK is current, if the anchored one is held
	followLower          bool // 2: any revision
	acknowledgeUnsealed  bool // 3: before the KEK is sealed and saved
	stagedStaysClosed    bool // 4
	activateBlind        bool // 5
	stageOverStaged      bool // 6
	abortForgets         bool // 7
	announceBeforeSaving bool // 8
	publishNothing       bool // 9
	publishAnything      bool // 9: also over a higher revision
	pruneBlind           bool // 10
	pruneUnfollowed      bool // 10: although a node has not followed
	pruneForGood         bool // 10: without an archive
	joinBeforeListed     bool // 11
	startRemoved         bool // 12
	startBlind           bool // 13
}

type bounds struct {
	keks, rev                         uint8 // KEKs made in total; the highest revision
	restores, joins, removes, attacks uint8
	takeOvers, boots                  uint8 // how often the driver changes, and how often a node boots in another way
	stays                             bool  // the machine of a removed node goes on
	answers                           bool  // the store answers each node that starts
	archives                          bool  // a KEK is pruned although a snapshot may need it again
}

type model struct {
	t *testing.T
	bounds
	rules
	real *reality // nil if a rule is left out
}

// label describes a move, for the failure message.
type label struct {
	what string
	node uint8
}

func (l label) String() string {
	if l.node == 0xff {
		return l.what
	}
	return fmt.Sprintf("%s %c", l.what, 'A'+rune(l.node))
}

func start() state {
	d := doc{rev: 1, cur: 1, members: 0b011}
	s := state{etcd: d, next: 2}
	for i := range 2 {
		k := kept{doc: d}
		s.n[i] = machine{member: true, up: true, local: k, mem: k, said: 1, seed: 1}
		s.r[i] = record{said: 1, anchored: 1, encrypted: 1, rev: 1, counts: true}
	}
	return s
}

// named returns the node that the keyring names as the driver, in walks where the driver
// matters.
func (m *model) named(i uint8) uint8 {
	if m.takeOvers == 0 {
		return 0
	}
	return i + 1
}

// announce tells the kube-apiserver the open KEK.
func (m *machine) announce() {
	if m.said != 0 && m.said != m.mem.cur {
		m.left |= bit(m.said)
	}
	m.said, m.looking = m.mem.cur, false
}

func (m *model) open(n machine) kept {
	k := n.local
	if m.stagedStaysClosed {
		k.sealed = false
	}
	return k
}

// follows is rule 2.
func (m *model) follows(l kept, r doc, me uint8) bool {
	third := r.cur == l.cur || r.cur == l.staged && l.sealed
	return r.members.has(me) && (r.rev > l.rev || m.followLower && r != l.doc) && r.holds(l.cur) && (third || m.followAnyKEK)
}

// removed is rule 12: a keyring that the node would follow, but that does not list it.
func (m *model) removed(l kept, r doc, me uint8) bool {
	return !r.members.has(me) && r.rev > l.rev && r.holds(l.cur) && (r.cur == l.cur || r.cur == l.staged && l.sealed)
}

// precedes is rule 9.
func (m *model) precedes(r doc, l kept) bool {
	return (r.rev < l.rev || m.publishAnything && r != l.doc) && l.holds(r.cur)
}

// moves calls add with every possible next state.
func (m *model) moves(s *state, add func(label, state)) {
	for i := range uint8(modelNodes) {
		if !s.n[i].member {
			m.joined(s, i, add)
			continue
		}
		if s.n[i].removed {
			m.leaves(s, i, add)
			continue
		}
		m.suffers(s, i, add)
		if s.n[i].up {
			m.keepsUp(s, i, add)
			m.changes(s, i, add)
		}
	}
	if !s.snapped && s.restores < m.restores {
		t := *s
		t.snap, t.snapDB, t.snapR, t.snapped = s.etcd, s.db, s.r, true
		add(label{"snapshot", 0xff}, t)
	}
	if s.snapped && s.restores < m.restores && s.snap.rev < s.etcd.rev {
		t := *s
		t.etcd, t.db, t.r = s.snap, s.snapDB, s.snapR
		t.restores++
		t.lost = t.archived
		add(label{"RESTORE", 0xff}, t)
	}
	m.intrudes(s, add)
}

// suffers adds what may happen to a node, and what its kube-apiserver does.
func (m *model) suffers(s *state, i uint8, add func(label, state)) {
	n := &s.n[i]
	t := *s
	if n.up {
		t.n[i].up, t.n[i].mem, t.n[i].looking = false, kept{}, false
		add(label{"crash", i}, t)
		if n.seed != n.said {
			t = *s
			t.n[i].seed = n.said
			add(label{"encrypt", i}, t)
		}
	} else {
		t.n[i].up, t.n[i].mem = true, m.open(*n)
		if m.answers && !m.startBlind { // rule 13
			t.n[i].looking = true
		} else {
			t.n[i].announce()
		}
		if m.answers && !t.n[i].looking && s.etcd.cur != n.local.cur && m.decideFollow(s, i) {
			t.broken = brokenLook
		}
		add(label{"start", i}, t)
		if s.boots < m.boots && !n.moved {
			t.boots++
			t.n[i].moved = true
			add(label{"start in another way", i}, t)
		}
	}
	if !s.db.has(n.seed) {
		t = *s
		t.db |= bit(n.seed)
		add(label{"write", i}, t)
	}
}

// leaves adds the moves of a removed node whose machine goes on: it keeps the keyring
// that removed it, serves on, and starts again. Nobody reads its writes, because it was
// cut off.
func (m *model) leaves(s *state, i uint8, add func(label, state)) {
	n := &s.n[i]
	t := *s
	if n.up {
		t.n[i].up, t.n[i].mem = false, kept{}
		add(label{"crash", i}, t)
		if m.decideRemoved(s, i) && !n.noted {
			t = *s
			t.n[i].noted = true
			add(label{"note its removal", i}, t)
		}
		return
	}
	knows := n.noted || m.decideRemoved(s, i)
	if knows && !m.startRemoved {
		return // it is locked
	}
	t.n[i].up, t.n[i].mem = true, m.open(*n)
	if knows {
		t.broken = brokenRemoved
	}
	add(label{"start", i}, t)
}

// keepsUp adds the ways in which a node follows, acknowledges, publishes and records.
func (m *model) keepsUp(s *state, i uint8, add func(label, state)) {
	n := &s.n[i]
	inMemory := n.mem.doc == n.local.doc
	if !inMemory {
		t := *s
		t.n[i].mem = m.open(*n)
		t.n[i].announce()
		if m.announceBeforeSaving {
			t = *s
			t.n[i].local = n.mem
			add(label{"save late", i}, t)
			return
		}
		add(label{"announce", i}, t)
		return
	}
	switch {
	case m.decideFollow(s, i):
		m.follow(s, i, add)
	case n.looking:
		t := *s
		t.n[i].announce()
		add(label{"announce after a look", i}, t)
		return
	}
	if n.local.staged != 0 && !n.local.sealed && (!n.moved || n.local.moved) {
		t := *s
		t.n[i].local.sealed = true
		t.n[i].mem = m.open(t.n[i])
		if m.real != nil {
			m.real.seal(s.n[i].local, i)
		}
		add(label{"seal", i}, t)
	}
	if !m.publishNothing && m.decidePublish(s, i) {
		t := *s
		m.put(&t, n.local.doc)
		add(label{"publish", i}, t)
	}
	if m.archives && s.etcd.rev < n.local.rev && n.local.rev < m.rev && !n.local.holds(s.etcd.cur) { // an operator discards it
		t := *s
		d := n.local.doc
		d.rev++
		d.made = s.restores
		m.put(&t, d)
		if m.real != nil {
			m.real.discard(n.local, i, t.etcd)
		}
		add(label{"publish --discard", i}, t)
	}
	inStep := slices.ContainsFunc(s.n[:], func(n machine) bool { return n.member && n.local.doc == s.etcd })
	if s.lost.has(s.etcd.cur) && !n.local.holds(s.etcd.cur) && inStep && !m.decideFollow(s, i) { // it has pruned a KEK that the others use again
		t := *s
		t.n[i] = machine{left: n.left, seed: n.said}
		add(label{"reset", i}, t)
	}
	if want := m.says(s, i); want != s.r[i] && s.etcd.members.has(i) {
		t := *s
		t.r[i] = want
		add(label{"record", i}, t)
	}
}

func (m *model) says(s *state, i uint8) record {
	n := &s.n[i]
	r := record{said: n.said, anchored: n.local.cur, encrypted: n.seed, rev: n.local.rev, moved: n.moved, counts: true}
	if n.local.staged != 0 && (n.local.sealed || m.acknowledgeUnsealed) {
		r.acked = n.local.staged
	}
	// The node may be ahead of a restored store.
	if k := s.etcd.staged; n.mem.holds(k) {
		r.acked = k
	}
	return r
}

func (m *model) follow(s *state, i uint8, add func(label, state)) {
	n, r := &s.n[i], s.etcd
	t := *s
	next := kept{doc: r, sealed: r.staged != 0 && r.staged == n.local.staged && n.local.sealed}
	if r.made == madeByIntruder && !s.known.has(n.local.cur) {
		t.broken = brokenAnchor
	}
	if r.cur == intruders && n.local.cur != intruders && !(n.local.staged == intruders && n.local.sealed) {
		t.broken = brokenConsent
	}
	if m.announceBeforeSaving {
		t.n[i].mem = next
		t.n[i].announce()
		add(label{"announce before saving", i}, t)
		return
	}
	t.n[i].local = next
	add(label{"save", i}, t)
}

// changes adds the changes of the shared keyring by a node that is in step.
func (m *model) changes(s *state, i uint8, add func(label, state)) {
	n := &s.n[i]
	if n.looking || n.mem.doc != n.local.doc || n.local.doc != s.etcd && !m.changeOutOfStep || n.local.rev >= m.rev {
		return
	}
	now := n.local.doc
	commit := func(what string, change func(d *doc), then func(t *state)) {
		t := *s
		d := now
		d.rev++
		d.made = s.restores
		change(&d)
		m.put(&t, d)
		if then != nil {
			then(&t)
		}
		if m.real != nil {
			m.real.change(n.local, i, d, what)
		}
		add(label{what, i}, t)
	}
	mayStage, mayActivate := m.decideNext(s, i)
	if mayStage && s.next <= m.keks {
		commit("stage", func(d *doc) {
			d.staged, d.by, d.moved = s.next, m.named(i), false
			for j := range s.r {
				d.moved = d.moved || s.r[j].moved
			}
		}, func(t *state) { t.next++ })
	}
	if mayActivate {
		commit("activate", func(d *doc) { d.retired |= bit(d.cur); d.cur, d.staged, d.by, d.moved = d.staged, 0, 0, false }, func(t *state) {
			for j := range uint8(modelNodes) {
				l := s.n[j].local
				if s.known.has(l.cur) { // the intruder may have taken the KEK away from the node again
					continue
				}
				if now.members.has(j) && s.n[j].member && !l.holds(now.staged) && !(l.staged == now.staged && l.sealed) {
					t.broken = brokenAcknowledgement
				}
			}
		})
	}
	if now.staged != 0 && n.mem.sealed {
		commit("abort", func(d *doc) {
			if !m.abortForgets {
				d.retired |= bit(d.staged)
			}
			d.staged, d.by, d.moved = 0, 0, false
		}, nil)
	}
	m.drives(s, i, commit)
	for j := range uint8(modelNodes) {
		if s.removes < m.removes && j != i && now.members.has(j) {
			commit("remove "+string('A'+rune(j))+" by", func(d *doc) {
				d.members &^= bit(j)
				if d.by == j+1 {
					d.by = i + 1
				}
			}, func(t *state) {
				t.removes++
				t.r[j] = record{}
				if t.attacks < m.attacks && s.n[j].member {
					l := s.n[j].local
					t.x, t.known = l.doc, s.known|l.retired|bit(l.cur)|bit(intruders)
					if l.sealed && l.staged != 0 {
						t.known |= bit(l.staged)
					}
				}
				t.n[j].removed, t.n[j].said = true, 0
				if !m.stays || !s.n[j].member {
					t.n[j] = machine{} // its machine is off: it joins again, or never does
				}
			})
		}
	}
	if s.db&^bit(n.seed) != 0 {
		t := *s
		t.db = bit(n.seed)
		add(label{"migrate", i}, t)
	}
	if s.snapped && !m.archives || s.attacks > 0 {
		return
	}
	encrypting := m.decideEncrypting(s, i)
	for k := uint8(1); k < s.next; k++ {
		if now.retired.has(k) && !s.db.has(k) && encrypting {
			commit("prune", func(d *doc) { d.retired &^= bit(k) }, func(t *state) {
				if !m.pruneForGood {
					t.archived |= bit(k)
				}
			})
		}
	}
}

// drives adds the ways in which another node takes over a rotation, and in which the
// driver wraps the staged KEK again for a node that boots in another way.
func (m *model) drives(s *state, i uint8, commit func(string, func(*doc), func(*state))) {
	n := &s.n[i]
	now := n.local.doc
	if now.staged == 0 {
		return
	}
	if s.takeOvers < m.takeOvers && now.by != i+1 {
		commit("take over by", func(d *doc) { d.by = i + 1 }, func(t *state) { t.takeOvers++ })
	}
	if now.moved || !n.mem.sealed || now.by != m.named(i) {
		return
	}
	for j := range uint8(modelNodes) {
		r := s.r[j]
		if now.members.has(j) && r.counts && r.moved && r.said == now.cur {
			commit("wrap anew by", func(d *doc) { d.moved = true }, nil)
			return
		}
	}
}

// joined is node i's join through any node that is in step. It may break off: the node
// is then listed, and holds nothing or everything.
func (m *model) joined(s *state, i uint8, add func(label, state)) {
	for j := range uint8(modelNodes) {
		v := &s.n[j]
		if i == j || !v.up || v.removed || v.looking || v.local.doc != s.etcd || v.mem.doc != s.etcd || v.said != v.mem.cur {
			continue
		}
		t := *s
		if !s.etcd.members.has(i) {
			if s.joins >= m.joins || s.etcd.rev >= m.rev || s.etcd.staged != 0 && !v.mem.sealed {
				continue
			}
			t.joins++
			d := t.etcd
			d.rev++
			d.made = s.restores
			if !m.joinBeforeListed {
				d.members |= bit(i)
			}
			m.put(&t, d)
			if m.real != nil {
				m.real.change(v.local, j, t.etcd, "add "+string('A'+rune(i)))
			}
			add(label{"list " + string('A'+rune(i)) + " by", j}, t)
		} else if s.etcd.staged != 0 && !v.mem.sealed {
			continue // V can wrap only what it has open
		}
		k := kept{doc: t.etcd, sealed: t.etcd.staged != 0}
		if m.real != nil {
			m.real.join(k, i)
		}
		left := s.n[i].left
		if before := s.n[i].seed; before != 0 && before != k.cur {
			left |= bit(before)
		}
		t.n[i] = machine{member: true, up: true, local: k, mem: k, said: k.cur, seed: k.cur, left: left}
		t.r[i] = record{said: k.cur, anchored: k.cur, encrypted: k.cur, rev: k.rev, counts: true}
		if !t.etcd.members.has(i) {
			t.broken = brokenHolders
		}
		add(label{"join", i}, t)
	}
}

// intrudes adds the writes of the intruder, who holds the KEKs of a removed node.
func (m *model) intrudes(s *state, add func(label, state)) {
	if s.known == 0 || s.attacks >= m.attacks || s.etcd.rev >= m.rev {
		return
	}
	f := doc{rev: s.etcd.rev + 1, cur: s.x.cur, retired: s.x.retired, members: s.etcd.members, made: madeByIntruder}
	staged, active := f, f
	staged.staged = intruders
	for i := range uint8(modelNodes) {
		if f.members.has(i) && m.takeOvers > 0 {
			staged.by = i + 1 // reality.forge stages as the last node
		}
	}
	active.cur, active.retired = intruders, f.retired|bit(f.cur)
	for i, d := range []doc{f, staged, active, s.x} {
		t := *s
		m.put(&t, d)
		t.attacks++
		if m.real != nil && d != s.x {
			m.real.forge(s.x, d)
		}
		add(label{[]string{"FORGE under the old KEK", "FORGE a staged KEK", "FORGE a current KEK", "REPLAY"}[i], 0xff}, t)
	}
}

// check returns a description of a broken invariant, or "".
func (s *state) check() string {
	if s.broken != fine {
		return breaches[s.broken]
	}
	for i := range uint8(modelNodes) {
		n := &s.n[i]
		if n.said != 0 && n.left.has(n.said) {
			return fmt.Sprintf("node %c announces a key ID again that it had left", 'A'+rune(i))
		}
		if !n.up || n.removed || !s.etcd.members.has(i) || s.known.has(n.mem.cur) { // no invariant holds for a node whose keyring the intruder can write
			continue
		}
		if s.db&^n.reads()&^s.lost != 0 {
			return fmt.Sprintf("node %c can't read what is stored", 'A'+rune(i))
		}
	}
	return ""
}

// healed: every member is up, in step, announces and has recorded the current KEK, and
// nothing is staged.
func (s *state) healed() bool {
	for i := range uint8(modelNodes) {
		n := &s.n[i]
		if s.etcd.members.has(i) && (!n.up || n.removed || n.local.doc != s.etcd || n.mem.doc != s.etcd || n.said != s.etcd.cur) {
			return false
		}
	}
	return s.etcd.staged == 0
}

// highest returns the highest revision that anybody has.
func (s *state) highest() uint8 {
	rev := s.etcd.rev
	for i := range s.n {
		rev = max(rev, s.n[i].local.rev)
	}
	return rev
}

// walk is the result of visiting every state.
type walk struct {
	states []state
	from   []int32
	by     []move
	next   [][]int32 // filled for liveness
	broken string

	seed  maphash.Seed
	table []int32 // the state of a hash, plus one: for millions of states this takes less memory than a map
	words []string
}

// move is a label in two bytes.
type move struct{ what, node uint8 }

// visit returns the number of a state. The state is new if that number equals the former
// number of states.
func (w *walk) visit(t *state) int32 {
	if 2*len(w.states) >= len(w.table) {
		w.table = make([]int32, max(4*len(w.table), 1<<16))
		for i := range w.states {
			w.table[w.slot(&w.states[i])] = int32(i) + 1
		}
	}
	at := w.slot(t)
	if w.table[at] == 0 {
		w.states = append(w.states, *t)
		w.table[at] = int32(len(w.states))
	}
	return w.table[at] - 1
}

// slot returns the table index of a state, or the free index where it belongs.
func (w *walk) slot(t *state) uint64 {
	mask := uint64(len(w.table) - 1)
	at := maphash.Comparable(w.seed, *t) & mask
	for w.table[at] != 0 && w.states[w.table[at]-1] != *t {
		at = (at + 1) & mask
	}
	return at
}

func (w *walk) move(l label) move {
	i := slices.Index(w.words, l.what)
	if i < 0 {
		i = len(w.words)
		w.words = append(w.words, l.what)
	}
	return move{uint8(i), l.node}
}

func (m *model) walk(live bool) *walk {
	m.t.Helper()
	w := &walk{seed: maphash.MakeSeed(), from: []int32{-1}, by: []move{{}}}
	first := start()
	w.visit(&first)
	for at := int32(0); int(at) < len(w.states); at++ {
		s := w.states[at]
		if bad := s.check(); bad != "" {
			w.broken = fmt.Sprintf("%s after %d states: %s", bad, len(w.states), w.path(at))
			return w
		}
		if live {
			w.next = append(w.next, nil)
		}
		m.moves(&s, func(l label, t state) {
			i := w.visit(&t)
			if int(i) == len(w.from) {
				w.from, w.by = append(w.from, at), append(w.by, w.move(l))
			}
			if live {
				w.next[at] = append(w.next[at], i)
			}
		})
	}
	return w
}

func (w *walk) path(at int32) string {
	var moves []string
	for ; at > 0; at = w.from[at] {
		moves = append(moves, label{w.words[w.by[at].what], w.by[at].node}.String())
	}
	slices.Reverse(moves)
	return strings.Join(moves, " → ")
}

// stuck returns the number of states without a way to a healed state, and an example. A
// state in which any node has the highest revision is not counted, because nothing can be
// changed there.
func (w *walk) stuck(rev uint8) (count int, example string) {
	before := make([][]int32, len(w.states))
	for i, all := range w.next {
		for _, j := range all {
			before[j] = append(before[j], int32(i))
		}
	}
	good := make([]bool, len(w.states))
	var queue []int32
	for i := range w.states {
		if w.states[i].healed() {
			good[i] = true
			queue = append(queue, int32(i))
		}
	}
	for len(queue) > 0 {
		i := queue[0]
		queue = queue[1:]
		for _, j := range before[i] {
			if !good[j] {
				good[j] = true
				queue = append(queue, j)
			}
		}
	}
	for i := range w.states {
		if !good[i] && w.states[i].highest() < rev {
			if count++; example == "" {
				example = w.path(int32(i))
			}
		}
	}
	return count, example
}

// largeModel is the environment variable that asks for the large bounds, which need
// minutes and gigabytes.
const largeModel = "KLEIDI_MODEL"

// TestModelHolds: with the rules as they are, no order of events breaks an invariant.
func TestModelHolds(t *testing.T) {
	small := map[string]bounds{
		"rotation, no restore":      {keks: 2, rev: 3},
		"rotation with a join":      {keks: 2, rev: 4, joins: 1},
		"rotation with a restore":   {keks: 2, rev: 3, restores: 1},
		"an intruder beside a join": {keks: 2, rev: 3, joins: 1, removes: 1, attacks: 1},
		"an intruder who is early":  {keks: 2, rev: 5, removes: 1, attacks: 2},
		"another driver":            {keks: 2, rev: 4, takeOvers: 1},
		"another boot":              {keks: 2, rev: 4, boots: 1},
		"the driver is removed":     {keks: 2, rev: 3, takeOvers: 1, removes: 1},
		"a removed node goes on":    {keks: 2, rev: 4, removes: 1, stays: true},
		"the API answers":           {keks: 2, rev: 3, answers: true},
	}
	large := map[string]bounds{
		"two rotations with a join": {keks: 3, rev: 5, joins: 1},
		"join and restore":          {keks: 2, rev: 3, joins: 1, restores: 1},
		"two rotations, a restore":  {keks: 3, rev: 4, restores: 1},
		"an intruder":               {keks: 2, rev: 4, joins: 1, removes: 1, attacks: 1},
		"prune and a restore":       {keks: 2, rev: 4, restores: 1, archives: true},
		"a driver and a restore":    {keks: 2, rev: 4, takeOvers: 1, restores: 1},
		"another boot and restore":  {keks: 2, rev: 3, boots: 1, restores: 1},
		"driver, boot, removal":     {keks: 2, rev: 4, takeOvers: 1, boots: 1, removes: 1, stays: true},
	}
	all := small
	if os.Getenv(largeModel) != "" {
		all = large
	}
	for name, b := range all {
		t.Run(name, func(t *testing.T) {
			m := &model{t: t, bounds: b, real: newReality(t)}
			w := m.walk(false)
			if w.broken != "" {
				t.Error(w.broken)
			}
			t.Logf("%d states, %d keyrings, %d decisions", len(w.states), len(m.real.local), m.real.decisions)
		})
	}
}

// TestModelHeals: from every state with every node up and no fault, some sequence of
// moves ends in step with nothing staged.
func TestModelHeals(t *testing.T) {
	all := map[string]bounds{
		"rotation":                {keks: 2, rev: 3},
		"rotation with a join":    {keks: 2, rev: 3, joins: 1},
		"rotation with a removal": {keks: 2, rev: 4, removes: 1, joins: 1},
		"a restore":               {keks: 2, rev: 4, restores: 1, removes: 1},
		"another driver and boot": {keks: 2, rev: 5, takeOvers: 1, boots: 1},
	}
	if os.Getenv(largeModel) != "" {
		all = map[string]bounds{"prune and a restore": {keks: 2, rev: 4, restores: 1, removes: 1, archives: true}}
	}
	for name, b := range all {
		t.Run(name, func(t *testing.T) {
			w := (&model{t: t, bounds: b, real: newReality(t)}).walk(true)
			count, example := w.stuck(b.rev)
			t.Logf("%d states, %d without a way on; for instance %s", len(w.states), count, example)
			if count > 0 {
				t.Errorf("%d of %d states have no way on; for instance %s", count, len(w.states), example)
			}
		})
	}
}

// TestModelCatches leaves out one rule at a time, and expects the walk to catch each of
// the thirteen.
func TestModelCatches(t *testing.T) {
	const notHeld, notRead, waits = "a KEK becomes current that a node of the keyring does not hold", "can't read what is stored", "no way on"
	caught := map[int]bool{}
	for _, c := range []struct {
		rule int
		says string
		rules
		bounds
		want string
	}{
		{1, "change in step only", rules{changeOutOfStep: true}, bounds{keks: 2, rev: 3, joins: 1, removes: 1}, notRead},
		{2, "the KEK was acknowledged", rules{followAnyKEK: true}, bounds{keks: 2, rev: 3, removes: 1, attacks: 1}, "never acknowledged"},
		{2, "a higher revision", rules{followLower: true}, bounds{keks: 2, rev: 4, restores: 1}, notHeld},
		{3, "sealed before acknowledged", rules{acknowledgeUnsealed: true}, bounds{keks: 2, rev: 3}, notHeld},
		{4, "the staged KEK is opened", rules{stagedStaysClosed: true}, bounds{keks: 2, rev: 3}, notRead},
		{5, "all have acknowledged", rules{activateBlind: true}, bounds{keks: 2, rev: 3}, notHeld},
		{6, "one at a time", rules{stageOverStaged: true}, bounds{keks: 3, rev: 3, restores: 1}, notHeld},
		{7, "abort retires", rules{abortForgets: true}, bounds{keks: 2, rev: 3, restores: 1}, notHeld},
		{8, "save before announcing", rules{announceBeforeSaving: true}, bounds{keks: 2, rev: 3}, "announces a key ID again"},
		{9, "publish over lower alone", rules{publishAnything: true}, bounds{keks: 2, rev: 3, joins: 1}, notRead},
		{9, "publish over lower", rules{publishNothing: true}, bounds{keks: 2, rev: 4, restores: 1}, waits},
		{10, "prune with proof", rules{pruneBlind: true}, bounds{keks: 2, rev: 4}, notRead},
		{10, "followed before pruned", rules{pruneUnfollowed: true}, bounds{keks: 2, rev: 4, restores: 1, archives: true}, notHeld},
		{10, "archived before pruned", rules{pruneForGood: true}, bounds{keks: 2, rev: 4, restores: 1, archives: true}, notRead},
		{11, "holders are listed", rules{joinBeforeListed: true}, bounds{keks: 2, rev: 3, joins: 1}, "does not list"},
		{12, "missing means removed", rules{startRemoved: true}, bounds{keks: 2, rev: 3, removes: 1, stays: true}, "could know of its removal"},
		{13, "look before announcing", rules{startBlind: true}, bounds{keks: 2, rev: 3, answers: true}, "that the store had left"},
	} {
		caught[c.rule] = true
		t.Run(fmt.Sprintf("%d, %s", c.rule, c.says), func(t *testing.T) {
			w := (&model{t: t, rules: c.rules, bounds: c.bounds}).walk(c.want == waits)
			if count, example := w.stuck(c.rev); c.want == waits && w.broken == "" && count > 0 {
				w.broken = fmt.Sprintf("%d of %d states have %s; for instance %s", count, len(w.states), waits, example)
			}
			if !strings.Contains(w.broken, c.want) || w.broken == "" {
				t.Errorf("%d states; broken: %q, want %q", len(w.states), w.broken, c.want)
			} else {
				t.Log(w.broken)
			}
		})
	}
	for rule := 1; rule <= 13; rule++ {
		if !caught[rule] {
			t.Errorf("rule %d is never left out", rule)
		}
	}
}
