package keyring

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
)

// Trust returns the anchor in the form that an operator hands to a joining node:
// CLUSTER/KEYID/REVISION. Nothing in it is secret.
func (p Anchor) Trust() string { return fmt.Sprintf("%s/%s/%d", p.ClusterID, p.KeyID, p.Revision) }

// ParseTrust reads a result of [Anchor.Trust].
func ParseTrust(s string) (Anchor, error) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return Anchor{}, errors.New("want CLUSTER/KEYID/REVISION")
	}
	cluster, err := seal.ParseClusterID(parts[0])
	if err != nil {
		return Anchor{}, err
	}
	revision, err := strconv.ParseUint(parts[2], 10, 64)
	if err != nil || revision == 0 || revision > MaxRevision {
		return Anchor{}, fmt.Errorf("%.32q is no revision", parts[2])
	}
	if !validKeyID(seal.KeyID(parts[1])) {
		return Anchor{}, fmt.Errorf("%.80q is not a key ID", parts[1])
	}
	return Anchor{ClusterID: cluster, KeyID: seal.KeyID(parts[1]), Revision: revision}, nil
}

// CheckTrust refuses an open keyring for which this anchor does not vouch, as
// [Untrusted.Open] does.
func CheckTrust(k *Keyring, trust Anchor) error {
	return (&Untrusted{doc: k.doc}).checkAnchor(trust)
}

// Check refuses an entry that no keyring could hold.
func (n Node) Check() error {
	if n.SRK == nil && n.EpochIndex == 0 { // these fields are not known yet
		if !nodeName.MatchString(n.Name) {
			return errors.New("malformed name")
		}
		if n.EK != "" && !ekDigest.MatchString(n.EK) {
			return errors.New("malformed ek, want sha256: and 64 lower-case hexadecimal digits")
		}
		return nil
	}
	return (&node2{Name: n.Name, EK: n.EK, SRK: n.SRK, EpochIndex: n.EpochIndex}).check()
}

// CheckSeat refuses to revise the shared keyring on a node without the seat, as long as a
// change counts as made in the seat's file. Otherwise two nodes could make two keyrings
// of one revision.
func CheckSeat(k *Keyring) error {
	if k.doc.Format != format2 || k.doc.Commit != CommitLocal || len(k.doc.Nodes) == 1 {
		return nil
	}
	if self, ok := k.Self(); !ok || self.Name != k.doc.Seat {
		return fmt.Errorf("only node %s can change what all nodes share; run the command there", k.doc.Seat)
	}
	return nil
}
