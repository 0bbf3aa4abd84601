package rotation_test

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// reality holds a real keyring for each keyring of the model, made by the real
// operations, and asks the real rules to decide.
type reality struct {
	t         testing.TB
	ids       map[uint8]seal.KeyID
	published map[doc]*keyring.Untrusted
	local     map[file]*keyring.Keyring
	followed  map[choice]bool
	preceded  map[choice]bool
	decisions int
}

// file is a node's file.
type file struct {
	kept
	node uint8
}

// choice is a file and the content of the store.
type choice struct {
	file
	store doc
}

const modelCluster = 16 // the first byte of the cluster ID

func newReality(t testing.TB) *reality {
	r := &reality{t: t, ids: map[uint8]seal.KeyID{}, published: map[doc]*keyring.Untrusted{}, local: map[file]*keyring.Keyring{}, followed: map[choice]bool{}, preceded: map[choice]bool{}}
	for k := range uint8(8) {
		kek := r.kek(k)
		r.ids[k] = keyring.NewKeyID(seal.ClusterID{modelCluster}, kek)
		kek.Close()
	}
	first := start().etcd
	a := r.ok(keyring.New(seal.ClusterID{modelCluster}, r.kek(1), append(ownSlots(0), common...), []keyring.Node{{Name: nodeName(0)}}, now))
	a = r.ok(r.ok(r.ok(a.Upgrade(keyring.Node{Name: nodeName(0)})).WithNode(keyring.Node{Name: nodeName(1)}, now)).InCluster())
	a = r.ok(a.AtLeast(realRevision(first.rev)))
	r.publish(first, a)
	r.local[file{kept{doc: first}, 0}] = a
	r.join(kept{doc: first}, 1)
	t.Cleanup(func() {
		for _, k := range r.local {
			k.Close()
		}
	})
	return r
}

func nodeName(i uint8) string { return string('a' + rune(i)) }

// realRevision leaves room between two revisions of the model.
func realRevision(rev uint8) uint64 { return 20 * uint64(rev) }

// kek returns the KEK with that number.
func (r *reality) kek(k uint8) *seal.Secret {
	s, err := mem.Take(bytes.Repeat([]byte{k + 1}, seal.KEKSize))
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

var common = []seal.Slot{{Type: seal.TypeRecovery, Data: json.RawMessage(`{}`)}}

func ownSlots(i uint8) []seal.Slot {
	return []seal.Slot{{Type: seal.TypeTPM, Node: nodeName(i), Data: json.RawMessage(`{}`)}}
}

func (r *reality) ok(k *keyring.Keyring, err error) *keyring.Keyring {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
	return k
}

// publish notes the real keyring of a doc, and checks that it matches the model.
func (r *reality) publish(d doc, k *keyring.Keyring) {
	r.t.Helper()
	u, err := keyring.Parse(k.Shared())
	if err != nil {
		r.t.Fatal(err)
	}
	i := u.Info()
	var staged seal.KeyID
	if d.staged != 0 {
		staged = r.ids[d.staged]
	}
	var retired, members bits
	for _, x := range i.Retired {
		for k, id := range r.ids {
			if id == x.KeyID {
				retired |= bit(k)
			}
		}
	}
	for _, n := range i.Nodes {
		members |= bit(n.Name[0] - 'a')
	}
	if d.by != 0 && i.Staged.By != nodeName(d.by-1) {
		r.t.Fatalf("the model says %+v, the keyring is driven by %q", d, i.Staged.By)
	}
	if i.Revision != realRevision(d.rev) || i.Current.KeyID != r.ids[d.cur] || k.StagedID() != staged || retired != d.retired || members != d.members {
		r.t.Fatalf("the model says %+v, the keyring is %+v", d, i)
	}
	r.published[d] = u
}

func (r *reality) of(l kept, i uint8) *keyring.Keyring {
	r.t.Helper()
	k := r.local[file{l, i}]
	if k == nil {
		r.t.Fatalf("node %s has no keyring %+v", nodeName(i), l)
	}
	return k
}

// change makes the keyring d from the keyring of a node that is in step.
func (r *reality) change(l kept, i uint8, d doc, what string) {
	r.t.Helper()
	if r.published[d] != nil {
		return
	}
	k, at := r.of(l, i), now.Add(time.Duration(d.made)*time.Hour)
	var next *keyring.Keyring
	switch word, _, _ := cut(what); word {
	case "stage":
		next = r.ok(k.Stage(r.kek(d.staged), common, at))
	case "activate":
		next = r.ok(k.Activate(at))
	case "abort":
		next = r.ok(k.Abort(at))
	case "remove":
		next = r.ok(k.WithoutNode(nodeName(only(l.members &^ d.members))))
	case "take":
		next = r.ok(keyring.TakeOver(k))
	case "wrap":
		next = r.ok(keyring.WithStagedSlots(k, ownSlots(i)))
	case "add":
		next = r.ok(k.WithNode(keyring.Node{Name: nodeName(only(d.members &^ l.members))}, at))
	case "prune":
		next = r.ok(k.Prune(r.ids[only(l.retired&^d.retired)]))
	default:
		r.t.Fatal(what)
	}
	raised := r.ok(next.AtLeast(realRevision(d.rev)))
	r.publish(d, raised)
	next.Close()
	raised.Close()
}

// discard makes the keyring that a node publishes in place of a keyring that no node
// takes.
func (r *reality) discard(l kept, i uint8, d doc) {
	if r.published[d] == nil {
		k := r.ok(r.of(l, i).AtLeast(realRevision(d.rev)))
		r.publish(d, k)
		k.Close()
	}
}

// only returns the one element of a set.
func only(b bits) (i uint8) {
	for b != bit(i) {
		i++
	}
	return i
}

// seal opens the staged KEK on a node and seals it there.
func (r *reality) seal(l kept, i uint8) {
	key := file{kept{l.doc, true}, i}
	if r.local[key] != nil {
		return
	}
	k := r.of(l, i)
	opened := r.ok(k.OpenStaged(r.kek(l.staged)))
	r.local[key] = r.ok(opened.WithOwnSlots(k.OwnSlots(), ownSlots(i)))
	opened.Close()
}

// join makes the file of a node that received this keyring.
func (r *reality) join(k kept, i uint8) {
	if r.local[file{k, i}] != nil {
		return
	}
	u := r.published[k.doc]
	opened, err := u.Open(r.kek(k.cur), nil)
	r.ok(opened, err)
	var staged []seal.Slot
	if k.sealed {
		opened = r.ok(opened.OpenStaged(r.kek(k.staged)))
		staged = ownSlots(i)
	}
	r.local[file{k, i}] = r.ok(opened.OnNode(nodeName(i), ownSlots(i), staged))
	opened.Close()
}

// follows asks the real rule, and keeps the node's resulting keyring.
func (r *reality) follows(l kept, i uint8, store doc) bool {
	key := choice{file{l, i}, store}
	if is, known := r.followed[key]; known {
		return is
	}
	r.decisions++
	k, u := r.of(l, i), r.published[store]
	next, err := k.Follow(u, nil)
	if (err == nil) != (keyring.Follows(k, u) == nil) {
		r.t.Fatalf("Follow: %v, Follows: %v", err, keyring.Follows(k, u))
	}
	r.followed[key] = err == nil
	if err != nil {
		return false
	}
	at := file{kept{doc: store, sealed: len(next.OwnStagedSlots()) > 0}, i}
	if r.local[at] != nil {
		next.Close()
	} else {
		r.local[at] = next
	}
	return true
}

// removed asks the real rule whether a keyring says that the node is removed.
func (r *reality) removed(l kept, i uint8, store doc) bool {
	r.decisions++
	return seal.CauseOf(keyring.Follows(r.of(l, i), r.published[store])) == seal.CauseNodeRemoved
}

func (r *reality) precedes(l kept, i uint8, store doc) bool {
	key := choice{file{l, i}, store}
	is, known := r.preceded[key]
	if !known {
		r.decisions++
		is = keyring.Precedes(r.published[store], r.of(l, i)) == nil
		r.preceded[key] = is
	}
	return is
}

// records returns the store's records as a node with k reads them: a record that it can't
// verify is ignored, and a record that is older in the store than the keyring does not
// count.
func (r *reality) records(s *state, k *keyring.Keyring) (out []*keyring.VerifiedRecord) {
	for i, rec := range s.r {
		if rec.said == 0 || !rec.counts || !k.Holds(r.ids[rec.said]) {
			continue
		}
		v := &keyring.VerifiedRecord{KeyID: r.ids[rec.said], Record: keyring.Record{Node: nodeName(uint8(i)), Formats: keyring.Formats(), Revision: realRevision(rec.rev),
			Anchored: r.ids[rec.anchored], Announced: r.ids[rec.said], Encrypted: r.ids[rec.encrypted]}}
		if rec.acked != 0 && k.Holds(r.ids[rec.acked]) {
			v.Acknowledged, v.Proven = r.ids[rec.acked], true
		}
		out = append(out, v)
	}
	return out
}

// forge makes a keyring as an intruder who holds x would.
func (r *reality) forge(x, d doc) {
	if r.published[d] != nil {
		return
	}
	k, err := r.published[x].Open(r.kek(x.cur), nil)
	r.ok(k, err)
	step := func(next *keyring.Keyring, err error) { // the earlier keyring is no longer needed
		r.ok(next, err)
		k.Close()
		k = next
	}
	var as uint8
	for i := range uint8(modelNodes) {
		if d.members.has(i) {
			as = i
			if !x.members.has(i) {
				step(k.WithNode(keyring.Node{Name: nodeName(i)}, now))
			}
		}
	}
	step(k.OnNode(nodeName(as), ownSlots(as), nil))
	for i := range uint8(modelNodes) {
		if x.members.has(i) && !d.members.has(i) {
			step(k.WithoutNode(nodeName(i)))
		}
	}
	if x.staged != 0 {
		step(k.OpenStaged(r.kek(x.staged)))
		step(k.Abort(now))
		step(k.Prune(r.ids[x.staged]))
	}
	if d.staged == intruders || d.cur == intruders {
		step(k.Stage(r.kek(intruders), common, now))
	}
	if d.cur == intruders {
		step(k.WithOwnSlots(k.OwnSlots(), ownSlots(as)))
		step(k.Activate(now))
	}
	step(k.AtLeast(realRevision(d.rev)))
	r.publish(d, k)
	k.Close()
}

func cut(what string) (word, rest string, found bool) {
	for i := range what {
		if what[i] == ' ' {
			return what[:i], what[i+1:], true
		}
	}
	return what, "", false
}

// The decisions of the model, compared with those of the real rules.

func (m *model) agree(what string, s *state, i uint8, is, real bool) bool {
	if m.real == nil {
		return is
	}
	if is != real {
		m.t.Fatalf("%s: the model says %v, the code %v, for node %s in %+v", what, is, real, nodeName(i), *s)
	}
	return real
}

func (m *model) decideFollow(s *state, i uint8) bool {
	l := s.n[i].local
	return m.agree("follow", s, i, m.follows(l, s.etcd, i), m.real != nil && m.real.follows(l, i, s.etcd))
}

func (m *model) decideRemoved(s *state, i uint8) bool {
	l := s.n[i].local
	return m.agree("removed", s, i, m.removed(l, s.etcd, i), m.real != nil && m.real.removed(l, i, s.etcd))
}

func (m *model) decidePublish(s *state, i uint8) bool {
	l := s.n[i].local
	return m.agree("publish", s, i, m.precedes(s.etcd, l), m.real != nil && m.real.precedes(l, i, s.etcd))
}

// decideNext reports whether a node that is in step may stage, and whether it may
// activate.
func (m *model) decideNext(s *state, i uint8) (stage, activate bool) {
	l := s.n[i].local
	stage, activate = l.staged == 0 || m.stageOverStaged, l.staged != 0 && l.sealed
	for j := range uint8(modelNodes) {
		if !l.members.has(j) {
			continue
		}
		r := s.r[j]
		verifies := r.counts && (l.holds(r.said) || l.sealed && r.said == l.staged && r.said != 0)
		stage = stage && verifies && r.said == l.cur && r.anchored == l.cur && r.rev == l.rev
		activate = activate && (verifies && r.acked == l.staged || m.activateBlind)
	}
	if m.real == nil {
		return stage, activate
	}
	k := m.real.of(l, i)
	m.real.decisions++
	do := rotation.Next(k, k.CurrentID(), m.real.records(s, k)).Do
	return m.agree("stage", s, i, stage, do == rotation.Stage), m.agree("activate", s, i, activate, do == rotation.Activate)
}

// decideEncrypting reports whether every kube-apiserver encrypts under the current KEK.
func (m *model) decideEncrypting(s *state, i uint8) bool {
	l := s.n[i].local
	if m.pruneBlind {
		return true
	}
	all := true
	for j := range uint8(modelNodes) {
		if r := s.r[j]; l.members.has(j) {
			all = all && r.counts && (r.rev == l.rev || m.pruneUnfollowed) && r.said == l.cur && r.anchored == l.cur && r.encrypted == l.cur
		}
	}
	if m.real == nil {
		return all
	}
	k := m.real.of(l, i)
	return m.agree("encrypting", s, i, all, len(rotation.Encrypting(k, m.real.records(s, k))) == 0)
}
