package rotation

import (
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Action is the next thing that the driver of a rotation over several nodes does.
type Action string

// The actions.
const (
	// Stage: nothing is staged, and every node has followed the present revision, so that
	// its record names the boot states for which to wrap a fresh KEK.
	Stage Action = "stage"
	// Wait: for the nodes that Step names.
	Wait Action = "wait"
	// Activate: every node has acknowledged the staged KEK.
	Activate Action = "activate"
	// Settled: every node trusts and announces the current KEK, and nothing is staged.
	Settled Action = "settled"
)

// Step is the next step of a rotation.
type Step struct {
	Do Action
	// Missing are the nodes to wait for, in the keyring's order.
	Missing []Missing
}

// Missing is a node that a rotation waits for.
type Missing struct {
	Node string
	Why  Why
}

// Why is the reason why a rotation waits for a node.
type Why string

// The reasons.
const (
	WhyNoRecord        Why = "no record in the cluster store"
	WhyOldBinary       Why = "its binary does not read this format of the keyring"
	WhyNotAcknowledged Why = "it has not acknowledged the staged KEK"
	WhyNotFollowed     Why = "it has not followed the present keyring"
	WhyNotAnchored     Why = "its anchor is not on the current KEK"
	WhyNotAnnounced    Why = "it announces another KEK"
	WhyNotEncrypted    Why = "its kube-apiserver has not encrypted under the current KEK yet"
)

// Next returns the next step of a rotation, from the keyring of a node that is in step
// with the cluster store, and from the records in the store. replace is the key ID of
// the KEK to replace: while that KEK is current, the next step is to stage a fresh one.
// An observer passes "".
//
// A staged KEK is activated only when every node of the keyring has acknowledged this
// very KEK. No operator can override that; a node that can't acknowledge must be
// removed. Only one KEK is staged at a time, so a staged KEK comes first, whatever
// replace is.
func Next(k *keyring.Keyring, replace seal.KeyID, records []*keyring.VerifiedRecord) Step {
	if staged := k.StagedID(); staged != "" {
		return stepOrWait(k, records, Activate, func(r *keyring.VerifiedRecord) Why {
			if r.Acknowledged != staged || !r.Proven {
				return WhyNotAcknowledged
			}
			return ""
		})
	}
	if replace == k.CurrentID() {
		return stepOrWait(k, records, Stage, func(r *keyring.VerifiedRecord) Why {
			if r.Revision != k.Revision() {
				return WhyNotFollowed
			}
			return unsettled(k, r)
		})
	}
	return stepOrWait(k, records, Settled, func(r *keyring.VerifiedRecord) Why { return unsettled(k, r) })
}

// Encrypting returns the nodes whose kube-apiserver may still write under a KEK other
// than the current one. A retired KEK may be pruned only if there are none: a
// kube-apiserver keeps using its former seed for minutes after it was told of a new
// KEK. Each node must also have followed the present revision: a node that still has an
// aborted KEK staged could make that KEK current after the KEK was pruned and etcd was
// restored.
func Encrypting(k *keyring.Keyring, records []*keyring.VerifiedRecord) []Missing {
	return missing(k, records, func(r *keyring.VerifiedRecord) Why {
		if r.Revision != k.Revision() {
			return WhyNotFollowed
		}
		if why := unsettled(k, r); why != "" {
			return why
		}
		if r.Encrypted != k.CurrentID() {
			return WhyNotEncrypted
		}
		return ""
	})
}

// Behind returns the nodes that have not followed the present keyring, or do not trust and
// announce its KEK.
func Behind(k *keyring.Keyring, records []*keyring.VerifiedRecord) []Missing {
	return missing(k, records, func(r *keyring.VerifiedRecord) Why {
		if r.Revision != k.Revision() {
			return WhyNotFollowed
		}
		return unsettled(k, r)
	})
}

// unsettled says why a node does not trust and announce the current KEK yet. The node's
// record must be under that KEK, because any holder of a former KEK can write any other
// record.
func unsettled(k *keyring.Keyring, r *keyring.VerifiedRecord) Why {
	switch current := k.CurrentID(); {
	case r.KeyID != current:
		return WhyNotFollowed
	case r.Anchored != current:
		return WhyNotAnchored
	case r.Announced != current:
		return WhyNotAnnounced
	}
	return ""
}

// stepOrWait returns the step done if no node is missing, or else a wait for the
// missing nodes.
func stepOrWait(k *keyring.Keyring, records []*keyring.VerifiedRecord, done Action, check func(*keyring.VerifiedRecord) Why) Step {
	if m := missing(k, records, check); len(m) > 0 {
		return Step{Do: Wait, Missing: m}
	}
	return Step{Do: done}
}

// missing returns the nodes of k for whose record check gives a reason.
func missing(k *keyring.Keyring, records []*keyring.VerifiedRecord, check func(*keyring.VerifiedRecord) Why) (out []Missing) {
	for _, n := range k.Nodes() {
		why := WhyNoRecord
		if i := slices.IndexFunc(records, func(r *keyring.VerifiedRecord) bool { return r.Node == n.Name }); i >= 0 {
			if why = check(records[i]); why == "" && !slices.Contains(records[i].Formats, k.Format()) {
				why = WhyOldBinary
			}
		}
		if why != "" {
			out = append(out, Missing{n.Name, why})
		}
	}
	return out
}

// Describe names the missing nodes, each with the reason.
func Describe(missing []Missing) string {
	var all []string
	for _, m := range missing {
		all = append(all, "node "+m.Node+": "+string(m.Why))
	}
	return strings.Join(all, "; ")
}
