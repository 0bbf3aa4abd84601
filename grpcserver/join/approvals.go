package join

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
)

// Approval is an operator's one-use permission for a named node to join.
type Approval struct {
	joinproof.Approval
	Node string
	// Expires is how long the approval is valid, by the monotonic clock.
	Expires time.Duration
	// Seen is what the keyring said of the node when the operator approved it.
	Seen Seen
	// Files go to the node in the grant. The server closes their contents once the
	// approval is spent, has expired or is replaced.
	Files []SecretFile
}

// Seen is what the keyring said of a node's name at one time. A keyring that says something
// else may have dropped the node since.
type Seen struct {
	// Entry is the node's entry, or nil if there was none. Only a machine that takes the place
	// of this entry may join.
	Entry *keyring.Node
	// KeyID is the current KEK: a removal of the node ends with a fresh one.
	KeyID seal.KeyID
	// Former says that the keyring named a former node of this name, which knows the current
	// KEK.
	Former bool
}

// SecretFile is a file of the cluster's own bootstrap, such as a join token.
type SecretFile struct {
	Name    string
	Content *seal.Secret
}

// maxApprovals bounds the approvals in memory, including spent ones.
const maxApprovals = 256

const hintAgain = "approve the node again: run kleidi node approve NAME --ek EK"

// approvals are the approvals of one process.
type approvals struct {
	now func() time.Time

	mu  sync.Mutex
	all map[string]*entry // by node
}

// entry is an approval, with the progress of its use.
type entry struct {
	*Approval
	until time.Time // with a monotonic reading
	timer *time.Timer
	busy  bool
	spent bool
	// bound is the machine that was listed as a node by this approval: its storage root
	// key and epoch index. Only this machine can run the join again.
	bound []byte
	// seen is what the operator saw. Once the machine is listed, its entry is that machine's.
	seen Seen
}

func newApprovals(now func() time.Time) *approvals {
	return &approvals{now: now, all: map[string]*entry{}}
}

// put adds an approval, which replaces the node's former one. A join in progress with
// the former approval is refused at its next step. A machine is approved under one name: it
// would join under the name that its own operator chooses, and the other approval, with
// its bootstrap files, would wait for a node that never comes. An approval whose machine is
// listed does not count: the keyring decides then.
func (b *approvals) put(a *Approval) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for name, e := range b.all {
		if name != a.Node && e.EK == a.EK && e.bound == nil && b.usable(e) == nil {
			return seal.Errorf("", "approve it under that name again (run kleidi node approve "+name+" --ek "+a.EK+"), or withdraw that approval first: run kleidi node remove "+name,
				"the machine with that endorsement key is approved as node %s", name)
		}
	}
	former := b.all[a.Node]
	if former == nil && len(b.all) >= maxApprovals {
		return fmt.Errorf("%d nodes were approved since kleidi serve started, and no more are remembered; restart it", maxApprovals)
	}
	former.end()
	e := &entry{Approval: a, until: b.now().Add(a.Expires), seen: a.Seen}
	e.timer = time.AfterFunc(a.Expires, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		e.wipe()
	})
	b.all[a.Node] = e
	return nil
}

// find returns the approval of a node, even a spent one, or nil.
func (b *approvals) find(node string) *entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all[node]
}

// check refuses an approval that is no longer valid.
func (b *approvals) check(e *entry) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.usable(e)
}

func (b *approvals) usable(e *entry) error {
	switch {
	case b.all[e.Node] == nil:
		return exchange.Refuse(exchange.CheckNode, hintAgain, "the approval of node %q was withdrawn meanwhile", e.Node)
	case b.all[e.Node] != e:
		return exchange.Refuse(exchange.CheckNode, hintAgain, "the approval of node %q was replaced meanwhile", e.Node)
	case e.spent:
		return exchange.Refuse(exchange.CheckNode, hintAgain, "the approval of node %q was used: the node has joined", e.Node)
	case !b.now().Before(e.until):
		return exchange.Refuse(exchange.CheckNode, hintAgain, "the approval of node %q has expired", e.Node)
	}
	return nil
}

// take gives the approval to one exchange, until leave is called. The peer has proven
// its TPM.
func (b *approvals) take(e *entry, h *joinproof.Hello) (leave func(), err error) {
	machine := machineOf(h)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.usable(e); err != nil {
		return nil, err
	}
	if e.busy {
		return nil, errBusy
	}
	if e.bound != nil && !bytes.Equal(e.bound, machine) {
		return nil, exchange.Refuse(exchange.CheckNode, hintAgain, "the approval of node %q was used with another storage root key or epoch index", e.Node)
	}
	e.busy = true
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		e.busy = false
	}, nil
}

// bind notes that the node is listed.
func (b *approvals) bind(e *entry, h *joinproof.Hello, listed keyring.Node) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	e.bound, e.seen.Entry = machineOf(h), &listed
	return b.usable(e)
}

// seen returns what the keyring must still say, as [Host] says.
func (b *approvals) seen(e *entry) Seen {
	b.mu.Lock()
	defer b.mu.Unlock()
	return e.seen
}

// withdraw ends an approval that the keyring no longer bears out. An approval that has
// replaced it stays.
func (b *approvals) withdraw(e *entry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e.end()
	if b.all[e.Node] == e {
		delete(b.all, e.Node)
	}
}

// spend ends the approval: the node has shown that it opened the keyring.
func (b *approvals) spend(e *entry) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e.end()
}

// forget ends the approval of a node, whether or not a join with it is in progress.
func (b *approvals) forget(node string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all[node].end()
	delete(b.all, node)
}

// pending returns the names of the nodes that were listed and have not finished.
func (b *approvals) pending() map[string]bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := map[string]bool{}
	for name, e := range b.all {
		if e.bound != nil && !e.spent {
			all[name] = true
		}
	}
	return all
}

// Approved is an approval that no node has used.
type Approved struct {
	Node    string
	EK      string
	Until   time.Time
	Expired bool
}

// unused returns the approvals that no node has used, by name.
func (b *approvals) unused() (all []Approved) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(b.all)) {
		if e := b.all[name]; e.bound == nil && !e.spent {
			all = append(all, Approved{name, e.EK, e.until, !b.now().Before(e.until)})
		}
	}
	return all
}

// files returns copies of the files' contents, which the caller clears.
func (b *approvals) files(e *entry) []File {
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []File
	for _, f := range e.Files {
		f.Content.With(func(content []byte) { all = append(all, File{Name: f.Name, Content: bytes.Clone(content)}) })
	}
	return all
}

func (b *approvals) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.all {
		e.end()
	}
}

func (e *entry) end() {
	if e != nil {
		e.spent = true
		e.timer.Stop()
		e.wipe()
	}
}

func (e *entry) wipe() {
	for _, f := range e.Files {
		f.Content.Close()
	}
}

// machineOf returns what an approval is bound to, in addition to the endorsement key.
func machineOf(h *joinproof.Hello) []byte {
	return exchange.Frame(h.SRK, []byte(fmt.Sprint(h.EpochIndex)))
}

// policyDigest returns the digest of a boot policy for the audit log.
func policyDigest(a *Approval) string {
	sum := sha256.Sum256(a.BootPolicy.Marshal())
	return "sha256:" + hex.EncodeToString(sum[:])
}

var errBusy = status.Error(codes.ResourceExhausted, "another join of this node is in progress; run the command again once it has ended")
