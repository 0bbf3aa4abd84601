package rotation_test

import (
	"fmt"
	"hash/maphash"
	"os"
	"slices"
	"strings"
	"testing"
)

// The model is an exhaustive walk, breadth first, over everything that two nodes and a
// third that joins may do and suffer, in any order: stage, follow, acknowledge, record,
// activate, abort, join, remove, prune, write, migrate, crash, start, a snapshot of the
// cluster store and its restore, publish, and an intruder who holds the KEKs of a node
// that was removed and writes the store. It checks the invariants in each state, and
// that there is a way on from each.
//
// The nodes' decisions are those of the real keyring.Follows, keyring.Precedes and
// rotation.Next, over real keyrings that the real operations made (model_real_test.go).
// What the model itself takes for these rules is compared with them in each state, so
// that model and code can't part. It is what decides where a rule is left out, to see
// that the walk catches it.

const (
	modelNodes = 3
	// intruders is the KEK that the intruder made.
	intruders = 7
	// madeByIntruder marks what the intruder wrote.
	madeByIntruder = 9
)

// bits is a set of KEKs or of nodes.
type bits uint8

func bit(i uint8) bits { return 1 << i }

func (b bits) has(i uint8) bool { return b&bit(i) != 0 }

// doc is a shared keyring: what matters of it. Two that are alike are the same bytes.
type doc struct {
	rev, cur, staged uint8
	retired, members bits
	// made is how often the store was restored before, or madeByIntruder: after a restore
	// the same change makes other bytes.
	made uint8
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
	seed       uint8 // the KEK under which its kube-apiserver writes; it follows said with delay
	left       bits  // KEKs that its kube-apiserver has seen replaced
}

func (m machine) reads() bits {
	b := m.mem.retired | bit(m.mem.cur)
	if m.mem.sealed && m.mem.staged != 0 {
		b |= bit(m.mem.staged)
	}
	return b
}

// record is what a node says in the store; its MAC is under the KEK that it announces.
type record struct{ acked, said, anchored, encrypted, rev uint8 }

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
}

const (
	fine uint8 = iota
	brokenAnchor
	brokenConsent
	brokenAcknowledgement
	brokenHolders
)

var breaches = map[uint8]string{
	brokenAnchor:          "a node whose anchor the intruder does not know takes the intruder's keyring",
	brokenConsent:         "a node takes a KEK of the intruder's that it never acknowledged",
	brokenAcknowledgement: "a KEK becomes current that a node of the keyring does not hold",
	brokenHolders:         "a machine holds the KEK that the keyring does not list",
}

// rules are those that can be left out, by their numbers in the design.
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
	joinBeforeListed     bool // 11
}

type bounds struct {
	keks, rev                         uint8 // made in all; the highest revision
	restores, joins, removes, attacks uint8
}

type model struct {
	t *testing.T
	bounds
	rules
	real *reality // nil where a rule is left out
}

// label is a move, for people.
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
		s.r[i] = record{said: 1, anchored: 1, encrypted: 1, rev: 1}
	}
	return s
}

// announce tells the kube-apiserver what is open.
func (m *machine) announce() {
	if m.said != 0 && m.said != m.mem.cur {
		m.left |= bit(m.said)
	}
	m.said = m.mem.cur
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

// precedes is rule 9.
func (m *model) precedes(r doc, l kept) bool {
	return (r.rev < l.rev || m.publishAnything && r != l.doc) && l.holds(r.cur)
}

// moves calls add with every state that may come next.
func (m *model) moves(s *state, add func(label, state)) {
	for i := range uint8(modelNodes) {
		if !s.n[i].member {
			m.joined(s, i, add)
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
		add(label{"RESTORE", 0xff}, t)
	}
	m.intrudes(s, add)
}

// suffers is what happens to a node and what its kube-apiserver does.
func (m *model) suffers(s *state, i uint8, add func(label, state)) {
	n := &s.n[i]
	t := *s
	if n.up {
		t.n[i].up, t.n[i].mem = false, kept{}
		add(label{"crash", i}, t)
		if n.seed != n.said {
			t = *s
			t.n[i].seed = n.said
			add(label{"encrypt", i}, t)
		}
	} else {
		t.n[i].up, t.n[i].mem = true, m.open(*n)
		t.n[i].announce()
		add(label{"start", i}, t)
	}
	if !s.db.has(n.seed) {
		t = *s
		t.db |= bit(n.seed)
		add(label{"write", i}, t)
	}
}

// keepsUp is how a node follows, acknowledges, publishes and tells.
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
	if m.decideFollow(s, i) {
		m.follow(s, i, add)
	}
	if n.local.staged != 0 && !n.local.sealed {
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
		t.etcd = n.local.doc
		add(label{"publish", i}, t)
	}
	if want := m.says(s, i); want != s.r[i] && s.etcd.members.has(i) {
		t := *s
		t.r[i] = want
		add(label{"record", i}, t)
	}
}

func (m *model) says(s *state, i uint8) record {
	n := &s.n[i]
	r := record{said: n.said, anchored: n.local.cur, encrypted: n.seed, rev: n.local.rev}
	if n.local.staged != 0 && (n.local.sealed || m.acknowledgeUnsealed) {
		r.acked = n.local.staged
	}
	// It may be ahead of a restored store.
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

// changes are those of the shared keyring, which a node makes that is in step.
func (m *model) changes(s *state, i uint8, add func(label, state)) {
	n := &s.n[i]
	if n.mem.doc != n.local.doc || n.local.doc != s.etcd && !m.changeOutOfStep || n.local.rev >= m.rev {
		return
	}
	now := n.local.doc
	commit := func(what string, change func(d *doc), then func(t *state)) {
		t := *s
		d := now
		d.rev++
		d.made = s.restores
		change(&d)
		t.etcd = d
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
		commit("stage", func(d *doc) { d.staged = s.next }, func(t *state) { t.next++ })
	}
	if mayActivate {
		commit("activate", func(d *doc) { d.retired |= bit(d.cur); d.cur, d.staged = d.staged, 0 }, func(t *state) {
			for j := range uint8(modelNodes) {
				l := s.n[j].local
				if s.known.has(l.cur) { // the intruder may have taken the KEK away from it again
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
			d.staged = 0
		}, nil)
	}
	for j := range uint8(modelNodes) {
		if s.removes < m.removes && j != i && now.members.has(j) {
			commit("remove "+string('A'+rune(j))+" by", func(d *doc) { d.members &^= bit(j) }, func(t *state) {
				t.removes++
				t.r[j] = record{}
				if t.attacks < m.attacks && s.n[j].member {
					l := s.n[j].local
					t.x, t.known = l.doc, s.known|l.retired|bit(l.cur)|bit(intruders)
					if l.sealed && l.staged != 0 {
						t.known |= bit(l.staged)
					}
				}
				t.n[j] = machine{} // its machine is off: it joins again or never
			})
		}
	}
	if s.db&^bit(n.seed) != 0 {
		t := *s
		t.db = bit(n.seed)
		add(label{"migrate", i}, t)
	}
	if s.snapped || s.attacks > 0 {
		return // an archive is for what a snapshot needs
	}
	encrypting := m.decideEncrypting(s, i)
	for k := uint8(1); k < s.next; k++ {
		if now.retired.has(k) && !s.db.has(k) && encrypting {
			commit("prune", func(d *doc) { d.retired &^= bit(k) }, nil)
		}
	}
}

// joined is node i's join through any node that is in step. It may break off: the node
// is then listed, and holds nothing or everything.
func (m *model) joined(s *state, i uint8, add func(label, state)) {
	for j := range uint8(modelNodes) {
		v := &s.n[j]
		if i == j || !v.up || v.local.doc != s.etcd || v.mem.doc != s.etcd || v.said != v.mem.cur {
			continue
		}
		t := *s
		if !s.etcd.members.has(i) {
			if s.joins >= m.joins || s.etcd.rev >= m.rev || s.etcd.staged != 0 && !v.mem.sealed {
				continue
			}
			t.joins++
			t.etcd.rev++
			t.etcd.made = s.restores
			if !m.joinBeforeListed {
				t.etcd.members |= bit(i)
			}
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
		t.n[i] = machine{member: true, up: true, local: k, mem: k, said: k.cur, seed: k.cur, left: s.n[i].left}
		t.r[i] = record{said: k.cur, anchored: k.cur, encrypted: k.cur, rev: k.rev}
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
	active.cur, active.retired = intruders, f.retired|bit(f.cur)
	for i, d := range []doc{f, staged, active, s.x} {
		t := *s
		t.etcd = d
		t.attacks++
		if m.real != nil && d != s.x {
			m.real.forge(s.x, d)
		}
		add(label{[]string{"FORGE under the old KEK", "FORGE a staged KEK", "FORGE a current KEK", "REPLAY"}[i], 0xff}, t)
	}
}

// check returns what is wrong.
func (s *state) check() string {
	if s.broken != fine {
		return breaches[s.broken]
	}
	for i := range uint8(modelNodes) {
		n := &s.n[i]
		if n.said != 0 && n.left.has(n.said) {
			return fmt.Sprintf("node %c announces a key ID again that it had left", 'A'+rune(i))
		}
		if !n.up || !s.etcd.members.has(i) || s.known.has(n.mem.cur) { // nothing holds for whom the intruder can write
			continue
		}
		if s.db&^n.reads() != 0 {
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
		if s.etcd.members.has(i) && (!n.up || n.local.doc != s.etcd || n.mem.doc != s.etcd || n.said != s.etcd.cur) {
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
	table []int32 // the state of a hash, plus one: millions of states take less so than in a map
	words []string
}

// move is a label in two bytes.
type move struct{ what, node uint8 }

// visit returns the number of a state. It is new if that is the number of states before.
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

// slot returns where a state is in the table, or belongs.
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

// stuck returns how many states have no way to one that is healed, and one of these. A
// state in which anybody has the highest revision is not counted: nothing can be
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

// largeModel is the environment variable that asks for the large bounds, which take
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
	}
	large := map[string]bounds{
		"two rotations with a join": {keks: 3, rev: 5, joins: 1},
		"join and restore":          {keks: 2, rev: 3, joins: 1, restores: 1},
		"two rotations, a restore":  {keks: 3, rev: 4, restores: 1},
		"an intruder":               {keks: 2, rev: 4, joins: 1, removes: 1, attacks: 1},
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

// TestModelHeals: from every state, with everybody up and nothing lost, some sequence
// of moves ends in step with nothing staged.
func TestModelHeals(t *testing.T) {
	for name, b := range map[string]bounds{
		"rotation":                {keks: 2, rev: 3},
		"rotation with a join":    {keks: 2, rev: 3, joins: 1},
		"rotation with a removal": {keks: 2, rev: 4, removes: 1, joins: 1},
		"a restore":               {keks: 2, rev: 4, restores: 1, removes: 1},
	} {
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

// TestModelCatches leaves out one rule at a time.
func TestModelCatches(t *testing.T) {
	const notHeld = "a KEK becomes current that a node of the keyring does not hold"
	for name, c := range map[string]struct {
		rules
		bounds
		want string
	}{
		"1, change in step only":        {rules{changeOutOfStep: true}, bounds{keks: 2, rev: 4}, notHeld},
		"2, the KEK was acknowledged":   {rules{followAnyKEK: true}, bounds{keks: 2, rev: 3, removes: 1, attacks: 1}, "never acknowledged"},
		"2, a higher revision":          {rules{followLower: true}, bounds{keks: 2, rev: 4, restores: 1}, notHeld},
		"3, sealed before acknowledged": {rules{acknowledgeUnsealed: true}, bounds{keks: 2, rev: 3}, notHeld},
		"4, the staged KEK is opened":   {rules{stagedStaysClosed: true}, bounds{keks: 2, rev: 3}, "can't read"},
		"5, all have acknowledged":      {rules{activateBlind: true}, bounds{keks: 2, rev: 3}, notHeld},
		"6, one at a time":              {rules{stageOverStaged: true}, bounds{keks: 3, rev: 3, restores: 1}, notHeld},
		"7, abort retires":              {rules{abortForgets: true}, bounds{keks: 2, rev: 3, restores: 1}, notHeld},
		"8, save before announcing":     {rules{announceBeforeSaving: true}, bounds{keks: 2, rev: 3}, "announces a key ID again"},
		"9, publish over lower alone":   {rules{publishAnything: true}, bounds{keks: 2, rev: 4}, notHeld},
		"10, prune with proof":          {rules{pruneBlind: true}, bounds{keks: 2, rev: 4}, "can't read"},
		"11, holders are listed":        {rules{joinBeforeListed: true}, bounds{keks: 2, rev: 3, joins: 1}, "does not list"},
	} {
		t.Run(name, func(t *testing.T) {
			w := (&model{t: t, rules: c.rules, bounds: c.bounds}).walk(false)
			if !strings.Contains(w.broken, c.want) || w.broken == "" {
				t.Errorf("%d states; broken: %q, want %q", len(w.states), w.broken, c.want)
			} else {
				t.Log(w.broken)
			}
		})
	}
	// Without this one the others wait for ever.
	w := (&model{t: t, rules: rules{publishNothing: true}, bounds: bounds{keks: 2, rev: 4, restores: 1}}).walk(true)
	count, example := w.stuck(4)
	t.Logf("9, publish: %d of %d states have no way on; for instance %s", count, len(w.states), example)
	if count == 0 {
		t.Error("9, publish: every state has a way on")
	}
}
