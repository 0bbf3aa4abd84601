// Package usagetext shows on a terminal which stored objects are under which key.
package usagetext

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/seal"
)

// Usage shows the resources that are encrypted or named, or all of them. roles are those of
// kleidi's key IDs.
func Usage(w io.Writer, u usage.Usage, roles map[string]string, named []string, all bool) {
	for i, s := range u.Stores {
		if i > 0 {
			fmt.Fprintln(w)
		}
		about := fmt.Sprintf("revision %d, %s", s.Revision, seal.Count(s.Objects, "object"))
		if s.Snapshot != nil {
			about += ", " + describeSnapshot(s.Snapshot)
		}
		fmt.Fprintf(w, "%s: %s\n", seal.OneLine(s.Source, 200), about)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "RESOURCE\tOBJECTS\tPROVIDER\tKEY")
		clear, inClear := 0, 0
		for _, r := range s.Resources {
			if !r.Encrypted() && !slices.Contains(named, r.Name) && !all {
				clear, inClear = clear+1, inClear+r.Objects
				continue
			}
			for _, c := range r.Keys {
				role := roles[c.ID]
				if c.Provider == usage.KMSv2 && c.ID == u.KeyID {
					role = "current"
				}
				cells := []string{seal.OneLine(r.Name, 100), fmt.Sprint(c.Objects), describeProvider(c.Key), seal.OneLine(c.ID, 100), role}
				for len(cells) > 3 && cells[len(cells)-1] == "" {
					cells = cells[:len(cells)-1]
				}
				fmt.Fprintln(t, strings.Join(cells, "\t"))
			}
		}
		t.Flush()
		if clear > 0 {
			fmt.Fprintf(w, "%s with %s in the clear throughout; --all lists them\n", seal.Count(clear, "more resource"), seal.Count(inClear, "object"))
		}
	}
	switch {
	case u.EncryptionConfig != "" && u.Left == 0:
		fmt.Fprintf(w, "\nevery object is stored as %s demands\n", u.EncryptionConfig)
	case u.EncryptionConfig != "":
		fmt.Fprintf(w, "\nnot stored as %s demands: %s\n", u.EncryptionConfig, seal.Count(u.Left, "object"))
	case u.KeyID == "":
	case u.Left == 0:
		fmt.Fprintln(w, "\nevery object of these resources is under the current key ID", u.KeyID)
	case u.Left == 1:
		fmt.Fprintln(w, "\n1 object is not under the current key ID", u.KeyID)
	default:
		fmt.Fprintf(w, "\n%d objects are not under the current key ID %s\n", u.Left, u.KeyID)
	}
}

func describeProvider(k usage.Key) string {
	switch {
	case k.Provider == usage.Identity:
		return "identity (in the clear)"
	case k.Name != "":
		return string(k.Provider) + " " + seal.OneLine(k.Name, 100)
	}
	return string(k.Provider)
}

func describeSnapshot(s *usage.SnapshotInfo) string {
	if s.Checked {
		return "etcd " + s.Etcd + ", checksum right"
	}
	return "etcd " + s.Etcd + ", WITHOUT A CHECKSUM: a copy of etcd's database file, or a snapshot that lost its end"
}

// Openings prints which key IDs of snapshots a keyring holds.
func Openings(w io.Writer, all []usage.Opening) {
	for i, o := range all {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s: revision %d, %s\n", seal.OneLine(o.Source, 200), o.Revision, describeSnapshot(o.Snapshot))
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, k := range o.KeyIDs {
			role := k.Role
			if role == "" {
				role = "MISSING"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\tplugin %s\n", role, seal.OneLine(k.KeyID, 100), seal.Count(k.Objects, "object"), seal.OneLine(k.Plugin, 100))
		}
		t.Flush()
		if o.Other > 0 {
			fmt.Fprintf(w, "%s under another provider, whose keys kleidi does not know\n", seal.Count(o.Other, "object"))
		}
		switch {
		case o.Foreign() && !archived(o.KeyIDs):
			fmt.Fprintln(w, "the keyring holds none of these key IDs: the snapshot is of another cluster, or the keyring is, or their KEKs were pruned")
			fmt.Fprintln(w, "  -> name the right copy of the keyring with --keyring, or the archives of pruned KEKs with --archive")
		case o.Missing > 0:
			fmt.Fprintf(w, "%s would not open after a restore\n", seal.Count(o.Missing, "object"))
			if printArchives(w, o.KeyIDs) {
				break
			}
			fmt.Fprintln(w, "  -> look for a copy of the keyring that was made after the snapshot, and check it with --keyring; name the archive of a pruned KEK with --archive")
		default:
			fmt.Fprintln(w, "the keyring holds every key ID of KMS v2 in this snapshot")
		}
	}
}

// archived reports whether a KEK that the keyring does not hold has an archive.
func archived(ids []usage.KeyIDUse) bool {
	return slices.ContainsFunc(ids, func(k usage.KeyIDUse) bool { return k.Archive != "" })
}

// printArchives says how to bring back the archived KEKs. It reports whether every
// missing KEK has an archive.
func printArchives(w io.Writer, ids []usage.KeyIDUse) (all bool) {
	all = true
	for _, k := range ids {
		switch {
		case k.Archive != "":
			fmt.Fprintln(w, "  -> bring "+k.KeyID+" back with kleidi keyring import-archive "+seal.Quote(k.Archive)+" and the recovery identity")
		case k.Role == "":
			all = false
		}
	}
	return all
}
