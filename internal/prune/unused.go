package prune

import (
	"fmt"
	"strings"

	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/seal"
)

// Unused returns an error if an object is, or may be, under a key ID.
func Unused(reports []*usage.Report, id seal.KeyID) error {
	var all []string
	snapshots := 0
	for _, r := range reports {
		under, unknown := r.Under(string(id))
		if under > 0 {
			all = append(all, fmt.Sprintf("%s holds %s under it", seal.OneLine(r.Source, 200), seal.Count(under, "object")))
		}
		if unknown > 0 {
			all = append(all, fmt.Sprintf("%s holds %s that may be under it: damaged, or encrypted in a way that kleidi does not know", seal.OneLine(r.Source, 200), seal.Count(unknown, "object")))
		}
		if r.Snapshot != nil && under+unknown > 0 {
			snapshots++
		}
		if r.Snapshot != nil && !r.Snapshot.Checked {
			all = append(all, r.Source+" has no checksum, so that it proves nothing")
		}
	}
	if len(all) == 0 {
		return nil
	}
	hint := "run kleidi migrate, and see with kleidi usage what is left"
	if snapshots > 0 {
		hint = "keep the KEK as long as you keep the snapshot"
	}
	return &seal.Error{Err: fmt.Errorf("prune: %s is needed: %s", seal.OneLine(string(id), 100), strings.Join(all, "; ")), Hint: hint}
}
