package members

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/join"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/replica/storetest"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
)

// wrongHolder answers at the approved address with the approved certificate, and gives
// something other than the keyring that --trust names.
type wrongHolder struct {
	*Desk
	alter func(*joinproof.Proven, *join.Admission)
}

// Admit implements [join.Host].
func (w *wrongHolder) Admit(ctx context.Context, p *joinproof.Proven, seen join.Seen) (*join.Admission, error) {
	a, err := w.Desk.Admit(ctx, p, seen)
	if err == nil && w.alter != nil {
		w.alter(p, a)
	}
	return a, err
}

// wrongDesk is a desk of the node that answers as a wrong holder.
func wrongDesk(t *testing.T, n *node.Node) *wrongHolder {
	t.Helper()
	d, err := NewDesk(n)
	if err != nil {
		t.Fatal(err)
	}
	w := &wrongHolder{Desk: d}
	if d.server, err = join.NewServer(join.Options{Host: w, Record: d.record, Log: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.Config.Join.Advertise = l.Addr().String()
	done := make(chan error)
	go func() { done <- d.server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		d.Stop(ctx)
		<-done
	})
	return w
}

// TestAnotherKEK: a holder of the approved certificate who offers a KEK that --trust does
// not name is refused, however the keyring is forged, and nothing stays on the machine.
func TestAnotherKEK(t *testing.T) {
	n, _ := seat(t)
	w, j := wrongDesk(t, n), machine(t, "beta")
	o := approve(t, w.Desk, j)
	honest, err := n.Unlocker.Keyring()
	if err != nil {
		t.Fatal(err)
	}
	other := founded(t, o.Trust.ClusterID)
	wrap := func(p *joinproof.Proven, kek *seal.Secret) []seal.Slot {
		slot, err := tpm.WrapFor(p.Peer, kek, p.State, p.Epoch)
		if err != nil {
			t.Error(err)
		}
		return []seal.Slot{slot}
	}
	listing := func(p *joinproof.Proven, k *keyring.Keyring) []byte {
		next, _, err := withNode(k, entryOf(p), seenOf(k, p.Peer.Node))
		if err != nil {
			t.Error(err)
			return nil
		}
		defer next.Close()
		return next.Shared()
	}
	claim := func(p *joinproof.Proven, old, now string) []byte {
		return forgeUnder(t, listing(p, other), other.KEK(), old, now)
	}
	for _, c := range []struct {
		name  string
		alter func(*joinproof.Proven, *join.Admission)
		cause seal.Cause
		says  []string
	}{
		{"a keyring of its own", func(p *joinproof.Proven, a *join.Admission) {
			a.Keyring, a.Current = listing(p, other), wrap(p, other.KEK())
		},
			seal.CauseAnchor, []string{"does not hold the anchored key ID " + string(o.Trust.KeyID), "find out who answers at " + o.Address}},
		{"the keyring, with a slot of its own KEK", func(p *joinproof.Proven, a *join.Admission) { a.Current = wrap(p, other.KEK()) },
			seal.CauseSlotCorrupt, []string{"the slot holds the KEK of key ID " + string(other.CurrentID()), "has key ID " + string(o.Trust.KeyID)}},
		{"its own KEK under the trusted key ID", func(p *joinproof.Proven, a *join.Admission) {
			a.Keyring, a.Current = claim(p, string(other.CurrentID()), string(o.Trust.KeyID)), wrap(p, other.KEK())
		}, seal.CauseSlotCorrupt, []string{"the slot holds the KEK of key ID " + string(other.CurrentID())}},
		{"the trusted key ID among the retired ones", func(p *joinproof.Proven, a *join.Admission) {
			retired := fmt.Sprintf(`"retired":[{"keyID":%q,"created":"2026-01-01T00:00:00Z","retired":"2026-01-02T00:00:00Z","sealed":%q}],"nodes":`, o.Trust.KeyID, strings.Repeat("A", 80))
			a.Keyring, a.Current = claim(p, `"nodes":`, retired), wrap(p, other.KEK())
		}, seal.CauseKeyringCorrupt, []string{"the retired KEK of key ID " + string(o.Trust.KeyID) + " does not open"}},
		{"the keyring, altered without the KEK", func(p *joinproof.Proven, a *join.Admission) {
			a.Keyring = forgeUnder(t, a.Keyring, other.KEK(), fmt.Sprintf(`"revision":%d`, a.Revision), fmt.Sprintf(`"revision":%d`, a.Revision+1))
		}, seal.CauseKeyringCorrupt, []string{"the keyring's MAC does not verify"}},
		{"an older keyring", func(_ *joinproof.Proven, a *join.Admission) { a.Keyring = honest.Shared() },
			seal.CauseAnchor, []string{"has revision", "the anchor expects revision"}},
		{"a keyring of another cluster", func(p *joinproof.Proven, a *join.Admission) {
			stranger := founded(t, seal.ClusterID{1})
			a.Keyring, a.Current = listing(p, stranger), wrap(p, stranger.KEK())
		}, seal.CauseAnchor, []string{"the keyring is of cluster", "find out who answers at"}},
	} {
		w.alter = c.alter
		trusting := o
		if c.name == "an older keyring" {
			trusting.Trust.Revision = honest.Revision() + 1
		}
		_, err := tryJoin(t, j, trusting)
		if seal.CauseOf(err) != c.cause {
			t.Errorf("%s: %v: cause %q, want %q", c.name, err, seal.CauseOf(err), c.cause)
			continue
		}
		for _, words := range c.says {
			if !strings.Contains(err.Error(), words) {
				t.Errorf("%s: %v does not say %q", c.name, err, words)
			}
		}
		if _, _, err := j.Keyring.File.Load(t.Context()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the machine has a keyring: %v", c.name, err)
		}
		if anchor, err := j.Anchor.Load(t.Context()); anchor != nil {
			t.Errorf("%s: the machine trusts %v, %v", c.name, anchor, err)
		}
	}
	w.alter = nil
	if _, err := tryJoin(t, j, o); err != nil {
		t.Errorf("afterwards, from the real holder: %v", err)
	}
}

// founded is the keyring of a cluster of one node with a KEK of its own.
func founded(t *testing.T, cluster seal.ClusterID) *keyring.Keyring {
	t.Helper()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Fatal(err)
	}
	first, err := keyring.New(cluster, kek, []seal.Slot{{Type: "recovery", Data: []byte("{}")}}, []keyring.Node{{Name: "alpha"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	k, err := first.Upgrade(keyring.Node{Name: "alpha"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// forgeUnder replaces a part of a keyring's body, and makes a MAC of the result with a
// KEK, as docs/keyring-format.md says.
func forgeUnder(t *testing.T, shared []byte, kek *seal.Secret, old, now string) []byte {
	t.Helper()
	var file struct {
		Body []byte `json:"body"`
		MAC  []byte `json:"mac"`
	}
	if err := json.Unmarshal(shared, &file); err != nil {
		t.Error(err)
	}
	body := bytes.Replace(file.Body, []byte(old), []byte(now), 1)
	if bytes.Equal(body, file.Body) {
		t.Errorf("the keyring holds no %s: %s", old, body)
	}
	kek.With(func(b []byte) {
		key, err := hkdf.Key(sha256.New, b, nil, "kleidi keyring mac v1", sha256.Size)
		if err != nil {
			t.Error(err)
		}
		h := hmac.New(sha256.New, key)
		h.Write(body)
		file.Body, file.MAC = body, h.Sum(nil)
	})
	b, err := json.Marshal(file)
	if err != nil {
		t.Error(err)
	}
	return append(b, '\n')
}

// TestTrustedKEKInWrongHands: a holder of the approved certificate who knows the KEK that
// --trust names can give a KEK of its own as the successor: at the join it looks like a
// rotation. The cluster store shows it, because no other node has acknowledged that KEK.
// Before the store holds the keyring, the new node is never in step. Afterwards the new
// node takes the store's keyring for an older one and replaces it, and every other node
// refuses the result by name.
func TestTrustedKEKInWrongHands(t *testing.T) {
	for name, inStore := range map[string]bool{"through the seat": false, "with the cluster store": true} {
		t.Run(name, func(t *testing.T) {
			reaches := func(c *config.Config) { c.Cluster.Kubeconfig = filepath.Join(c.State.Dir, "unused") }
			n, _ := seat(t, reaches)
			w, j := wrongDesk(t, n), machine(t, "beta", reaches)
			shared := &storetest.Memory{}
			for _, n := range []*node.Node{n, j} {
				n.Replica = replica.New(replica.Config{Store: shared, Unlocker: n.Unlocker, Log: slog.New(slog.DiscardHandler)})
			}
			o := approve(t, w.Desk, j)
			if inStore {
				if err := n.Replica.Sync(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			w.alter = func(p *joinproof.Proven, a *join.Admission) { succeed(t, n, p, a) }
			if _, err := tryJoin(t, j, o); err != nil {
				t.Fatalf("it does not look like a rotation meanwhile: %v", err)
			}
			if err := j.Unlocker.Unlock(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := n.Replica.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			theirs, ours := j.Replica.Sync(t.Context()), n.Replica.Sync(t.Context())
			k, err := n.Unlocker.Keyring()
			if err != nil || k.CurrentID() != o.Trust.KeyID {
				t.Fatalf("the other node has %s, %v", k.CurrentID(), err)
			}
			if inStore {
				if theirs != nil || seal.CauseOf(ours) != seal.CauseAnchor || !strings.Contains(ours.Error(), fmt.Sprintf("which this node (revision %d, key ID %s) has never acknowledged", k.Revision(), o.Trust.KeyID)) {
					t.Errorf("the new node: %v; the other: %v", theirs, ours)
				}
			} else if ours != nil || theirs == nil || !strings.Contains(theirs.Error(), "which is before this node's") {
				t.Errorf("the new node: %v; the other: %v", theirs, ours)
			}
			if n.Replica.State().InStep && j.Replica.State().InStep {
				t.Error("both are in step")
			}
		})
	}
}

// succeed gives the new node the keyring of n with another KEK in place of the present
// one, which no other node has acknowledged.
func succeed(t *testing.T, n *node.Node, p *joinproof.Proven, a *join.Admission) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		t.Error(err)
		return
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		t.Error(err)
		return
	}
	made := func(k *keyring.Keyring, err error) *keyring.Keyring {
		if err != nil { // this is a goroutine of the server
			panic(err)
		}
		t.Cleanup(func() { k.Close() })
		return k
	}
	staged := made(k.Stage(kek, []seal.Slot{{Type: "recovery", Data: []byte("{}")}}, time.Now()))
	acknowledged := made(staged.WithOwnSlots(k.OwnSlots(), k.OwnSlots()))
	theirs := made(acknowledged.Activate(time.Now()))
	slot, err := tpm.WrapFor(p.Peer, theirs.KEK(), p.State, p.Epoch)
	if err != nil {
		t.Error(err)
	}
	a.Keyring, a.Current, a.KeyID, a.Revision, a.Done = theirs.Shared(), []seal.Slot{slot}, theirs.CurrentID(), theirs.Revision(), theirs.JoinDone
}
