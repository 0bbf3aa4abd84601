package members

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/grpcserver/join"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// JoinOptions are the arguments that kleidi node approve printed.
type JoinOptions struct {
	Address  string
	Verifier string         // digest of the certificate of the node that gives the KEK
	Trust    keyring.Anchor // the node's first anchor
	// Keyring is a copy of the keyring for a machine without a TPM, which proves nothing.
	// It is nil if Address provides the keyring.
	Keyring []byte
	// Progress is told each step, for display.
	Progress func(step string)
}

// JoinResult is the output of join.
type JoinResult struct {
	Node      string         `json:"node"`
	ClusterID seal.ClusterID `json:"clusterID"`
	KeyID     seal.KeyID     `json:"keyID"`
	Revision  uint64         `json:"revision"`
	Keyring   string         `json:"keyring"`
	// Before says that the node had joined before, and nothing was done.
	Before bool `json:"before,omitempty"`
	// Files are the paths of the bootstrap files that came with the keyring.
	Files []string `json:"files,omitempty"`
	Notes []string `json:"notes,omitempty"`
}

// Join makes this machine a node of the cluster. Until its last step only the TPM's
// epoch counter exists here, and an interrupted command can be run again: it saves the
// anchor before the keyring, and an anchor without a keyring means nothing.
func Join(ctx context.Context, n *node.Node, o JoinOptions) (*JoinResult, error) {
	r, err := joinCluster(ctx, n, o)
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	return r, nil
}

func joinCluster(ctx context.Context, n *node.Node, o JoinOptions) (*JoinResult, error) {
	j := &joiner{Node: n, JoinOptions: o}
	if o.Keyring != nil {
		return j.withoutTPM(ctx)
	}
	client, err := join.NewClient(o.Address, o.Verifier)
	if err != nil {
		return nil, err
	}
	if k, err := j.before(ctx); k != nil || err != nil {
		return k, err
	}
	o.Progress("looking at this machine: its TPM, how it booted, and the event log")
	if err := j.look(ctx); err != nil {
		return nil, err
	}
	o.Progress("asking " + o.Address)
	grant, err := j.prove(ctx, client)
	if err != nil {
		return nil, err
	}
	defer j.session.Close()
	defer grant.Wipe()
	o.Progress("opening the received keyring, and checking it against --trust")
	k, err := j.open(ctx, grant)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	o.Progress("sealing to this boot, and opening the new slot")
	own, err := j.seal(ctx, k, grant)
	if err != nil {
		return nil, err
	}
	defer own.Close()
	r := &JoinResult{Node: n.Config.Node, ClusterID: own.ClusterID(), KeyID: own.CurrentID(), Revision: own.Revision(), Keyring: n.Config.Keyring()}
	if r.Files, err = writeFiles(bootstrapDir(j.Config.Admin.Socket), grant.Files); err != nil {
		return nil, err
	}
	o.Progress("saving the anchor, then the keyring in " + r.Keyring)
	if err := j.save(ctx, own); err != nil {
		return nil, err
	}
	o.Progress("telling " + o.Address + " that this node has opened the keyring")
	if err := j.session.Done(own.JoinDone(j.transcript)); err != nil {
		r.Notes = append(r.Notes, fmt.Sprintf("%s was not told that this node has opened the keyring: %v", o.Address, err))
	}
	return r, nil
}

// joiner is a join in progress on the new node.
type joiner struct {
	*node.Node
	JoinOptions
	version    store.Version // of the replaced keyring
	anchor     *keyring.Anchor
	state      tpm.BootState
	self       keyring.Node
	verifier   *tpm.Verifier
	session    *join.Session
	transcript []byte
}

// before returns the result if the node has already joined that cluster. It refuses to
// join if the stored keyring or anchor belongs to another cluster.
func (j *joiner) before(ctx context.Context) (*JoinResult, error) {
	stored, err := j.stored(ctx)
	if err != nil {
		return nil, err
	}
	if stored != nil && j.served(ctx) {
		if r, err := j.joined(stored); r != nil || err != nil {
			return r, err
		}
	}
	if err := j.AcquireState(); err != nil {
		return nil, err
	}
	if stored != nil {
		if k, err := j.Unlocker.Open(ctx); err == nil {
			defer k.Close()
			if r, err := j.joined(stored); r != nil || err != nil {
				return r, err
			}
		}
	}
	return nil, j.loadAnchor(ctx)
}

// joined returns the result if the keyring on this machine opens. --trust must vouch for
// that keyring. The result is nil if that keyring is older than --trust: the approval came
// after it, so the cluster may have dropped this node.
func (j *joiner) joined(u *keyring.Untrusted) (*JoinResult, error) {
	i := u.Info()
	if i.Revision < j.Trust.Revision {
		return nil, nil
	}
	if i.Current.KeyID != j.Trust.KeyID && !slices.ContainsFunc(i.Retired, func(r keyring.RetiredInfo) bool { return r.KeyID == j.Trust.KeyID }) {
		return nil, seal.Errorf(seal.CauseAnchor, "run the command that was printed when this node was approved", "the keyring here opens, but does not hold key ID %s, which --trust names", j.Trust.KeyID)
	}
	return &JoinResult{Node: j.Config.Node, ClusterID: u.ClusterID(), KeyID: u.CurrentID(), Revision: u.Revision(), Keyring: j.Config.Keyring(), Before: true}, nil
}

// stored returns the stored keyring if it belongs to the cluster to join and lists this
// node.
func (j *joiner) stored(ctx context.Context) (*keyring.Untrusted, error) {
	b, version, err := j.Node.Keyring.File.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, files.HintRoot(err)
	}
	j.version = version
	u, err := keyring.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s exists but can't be read, and join replaces no keyring that it can't read: %w", j.Config.Keyring(), err)
	}
	if u.ClusterID() != j.Trust.ClusterID {
		return nil, fmt.Errorf("%s is of cluster %s, and join never replaces the keyring of another cluster; run kleidi reset if this machine is to leave that cluster", j.Config.Keyring(), u.ClusterID())
	}
	if !slices.ContainsFunc(u.Info().Nodes, func(n keyring.Node) bool { return n.Name == j.Config.Node }) {
		return nil, nil
	}
	return u, nil
}

// served reports whether a running serve holds the cluster's keyring open.
func (j *joiner) served(ctx context.Context) bool {
	c, err := admin.Dial(ctx, j.Config.Admin.Socket)
	if err != nil {
		return false
	}
	s, err := admin.Call(ctx, c, admin.Status, admin.StatusRequest{})
	return err == nil && s.State == admin.Open && s.ClusterID == j.Trust.ClusterID.String()
}

// loadAnchor refuses an anchor of another cluster. An anchor of this cluster comes from
// a join that broke off, or from a lost keyring: the node never goes back behind it.
func (j *joiner) loadAnchor(ctx context.Context) error {
	anchor, err := j.Anchor.Load(ctx)
	if errors.Is(err, nv.ErrAnchorMissing) || errors.Is(err, nv.ErrAnchorUnwritten) || err == nil && anchor == nil {
		return nil
	}
	if err != nil {
		return err
	}
	if anchor.ClusterID != j.Trust.ClusterID {
		return fmt.Errorf("this machine's anchor is of cluster %s; run kleidi reset if this machine is to leave that cluster", anchor.ClusterID)
	}
	j.anchor = anchor
	return nil
}

// look is the preflight: before it asks another machine, it finds anything that would
// later keep this node from opening its keyring.
func (j *joiner) look(ctx context.Context) error {
	if !j.View.OpensWithTPM() {
		return reseal.ErrNoTPM
	}
	if _, err := j.TPM.Provision(ctx); err != nil {
		return err
	}
	machine, err := j.TPM.Self(ctx)
	if err != nil {
		return err
	}
	j.self = keyring.Node{Name: j.Config.Node, EK: machine.EK, SRK: machine.SRK, EpochIndex: machine.Epoch.Index()}
	if err := j.recordPolicy(ctx); err != nil {
		return err
	}
	if j.verifier, err = j.Remote.Demand(j.Trust.ClusterID); err != nil {
		return err
	}
	if j.state, err = j.Gate.State(ctx); err != nil {
		return err
	}
	return j.CheckAnchorable(ctx)
}

// recordPolicy records the running boot as the boot policy, as init does, if the
// configuration names a file that does not exist yet.
func (j *joiner) recordPolicy(ctx context.Context) error {
	path := j.Config.TPM.BootPolicy
	if path == "" {
		return nil
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p, err := reseal.RecordPolicy(ctx, j.Node, nil)
	if err != nil {
		return err
	}
	j.Progress("recording this boot as the boot policy " + path)
	return files.WriteNew(path, p.Marshal())
}

// prove proves the TPM and the boot, and returns the other node's grant.
func (j *joiner) prove(ctx context.Context, client *join.Client) (*join.Grant, error) {
	epoch, err := j.TPM.Epoch(ctx)
	if err != nil {
		return nil, err
	}
	terms := joinproof.Terms{Formats: keyring.Formats(), Bank: j.Config.Bank(), PCRs: slices.Sorted(maps.Keys(j.state.Values)), EpochIndex: j.Config.TPM.EpochIndex, Epoch: epoch,
		Verifier: joinproof.VerifierKey(j.verifier)}
	a := joinproof.Attester{Device: j.Gate.Device, Owner: j.Gate.Owner, Logs: j.Gate.Logs.Explaining}
	evidence, transcript, err := a.Prove(ctx, j.Trust.ClusterID, j.Config.Node, terms, func(h *joinproof.Hello) (*exchange.Challenge, []byte, error) {
		session, challenge, err := client.Begin(ctx, h)
		if err != nil {
			return nil, nil, err
		}
		j.session = session
		exporter, err := session.Exporter()
		return challenge, exporter, err
	})
	if err == nil {
		j.Progress("proving this machine's TPM and boot to " + j.Address)
		j.transcript = transcript
		var grant *join.Grant
		if grant, err = j.session.Prove(evidence); err == nil {
			return grant, nil
		}
	}
	if j.session != nil {
		j.session.Close()
	}
	return nil, err
}

// open opens the shared keyring with an import slot, and compares the keyring with
// --trust.
func (j *joiner) open(ctx context.Context, g *join.Grant) (*keyring.Keyring, error) {
	u, err := keyring.Parse(g.Keyring)
	if err != nil {
		return nil, err
	}
	kek, err := j.unwrap(ctx, g.Current)
	if err != nil {
		return nil, err
	}
	k, err := u.Open(kek, &j.Trust)
	if err != nil {
		kek.Close()
		return nil, j.explain(err)
	}
	if err := j.check(k); err != nil {
		k.Close()
		return nil, err
	}
	if k.StagedID() == "" {
		return k, nil
	}
	defer k.Close()
	if kek, err = j.unwrap(ctx, g.Staged); err != nil {
		return nil, err
	}
	opened, err := k.OpenStaged(kek)
	if err != nil {
		kek.Close()
	}
	return opened, err
}

// check demands that the keyring lists this machine, and that it does not go back
// behind the stored anchor.
func (j *joiner) check(k *keyring.Keyring) error {
	if a := j.anchor; a != nil && keyring.CheckTrust(k, *a) != nil {
		return seal.Errorf(seal.CauseAnchor, "find out which of the cluster's nodes has the newest keyring, and approve this node there",
			"the keyring of revision %d is older than the one that this node last trusted (revision %d, key ID %s)", k.Revision(), a.Revision, a.KeyID)
	}
	if !slices.ContainsFunc(k.Nodes(), j.self.SameTPM) {
		return errors.New("the received keyring does not list this node with its TPM")
	}
	return nil
}

// explain says why --trust may not vouch for a keyring.
func (j *joiner) explain(err error) error {
	if seal.CauseOf(err) != seal.CauseAnchor {
		return err
	}
	if j.Address == "" {
		return seal.WithHint(err, "run the command that was printed when this node was approved; if you did, find out where the copy of the keyring comes from")
	}
	return seal.WithHint(err, "run the command that was printed when this node was approved; if you did, find out who answers at "+j.Address)
}

func (j *joiner) unwrap(ctx context.Context, slots []seal.Slot) (*seal.Secret, error) {
	err := error(seal.Errorf(seal.CauseNoSlot, "set unlock.order on this node as it is set on the node that gives the KEK", "the received keyring has no slot that this node's configuration opens"))
	for _, s := range slots {
		w := j.Wrapper(s.Type)
		if w == nil || !slices.Contains(j.Config.Unlock.Order, s.Type) {
			continue
		}
		var kek *seal.Secret
		if kek, err = w.Unwrap(ctx, s); err == nil {
			return kek, nil
		}
	}
	return nil, err
}

// seal returns this node's keyring, with slots that its own TPM has made and opened.
func (j *joiner) seal(ctx context.Context, k *keyring.Keyring, g *join.Grant) (*keyring.Keyring, error) {
	w, err := j.TPM.With(tpm.SealOptions{Verifier: j.verifier, SameTPMAs: slotview.TPMParts(g.Current)})
	if err != nil {
		return nil, err
	}
	slot, err := reseal.SealPresent(ctx, j.Node, w, k.KEK())
	if err != nil {
		return nil, err
	}
	var staged []seal.Slot
	if kek := keyring.StagedKEK(k); kek != nil {
		next, err := reseal.SealPresent(ctx, j.Node, w, kek)
		if err != nil {
			return nil, err
		}
		staged = append(staged, next)
	}
	return k.OnNode(j.Config.Node, []seal.Slot{slot}, staged)
}

func (j *joiner) save(ctx context.Context, k *keyring.Keyring) error {
	if err := j.Anchor.Replace(ctx, k.Anchor()); err != nil {
		return err
	}
	_, err := j.Node.Keyring.Save(ctx, k.Marshal(), j.version)
	return err
}

// withoutTPM joins with a copy of the keyring, which a slot of a token or a server opens.
func (j *joiner) withoutTPM(ctx context.Context) (*JoinResult, error) {
	if j.View.OpensWithTPM() {
		return nil, errors.New("--keyring is for a machine without a TPM, and unlock.order names the TPM; run the command that was printed when this node was approved by its endorsement key")
	}
	u, err := keyring.Parse(j.JoinOptions.Keyring)
	if err != nil {
		return nil, err
	}
	if r, err := j.before(ctx); r != nil || err != nil {
		return r, err
	}
	j.Progress("opening the keyring by " + slotview.JoinWords(j.Config.Unlock.Order) + ", and checking it against --trust")
	k, _, err := j.Unlocker.OpenUnanchored(ctx, u)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	if err := keyring.CheckTrust(k, j.Trust); err != nil {
		return nil, j.explain(err)
	}
	if a := j.anchor; a != nil && keyring.CheckTrust(k, *a) != nil {
		return nil, fmt.Errorf("the keyring is older than the one that this node last trusted (revision %d); copy the newest one here", a.Revision)
	}
	own, err := k.OnNode(j.Config.Node, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("%w; run kleidi node approve %s --no-tpm, then copy the keyring here", err, j.Config.Node)
	}
	defer own.Close()
	j.Progress("saving the anchor, then the keyring in " + j.Config.Keyring())
	if err := j.save(ctx, own); err != nil {
		return nil, err
	}
	return &JoinResult{Node: j.Config.Node, ClusterID: own.ClusterID(), KeyID: own.CurrentID(), Revision: own.Revision(), Keyring: j.Config.Keyring()}, nil
}
