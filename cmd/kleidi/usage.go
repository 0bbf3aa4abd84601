package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// stores are the flags that name what to read.
type stores struct {
	etcds                     []string
	caFile, certFile, keyFile string
	snapshots                 []string
	prefix                    string
	resources                 []string
	// live says that an etcd is read even if a snapshot is named.
	live bool
}

func (s *stores) addFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&s.etcds, "etcd", nil, "URLs of an etcd's members, with commas between; once for each etcd (default the one of this control-plane node)")
	f.StringVar(&s.caFile, "cacert", "", "PEM file of etcd's CA")
	f.StringVar(&s.certFile, "cert", "", "PEM file of a client certificate for etcd")
	f.StringVar(&s.keyFile, "key", "", "PEM file of the client certificate's key")
	f.StringArrayVar(&s.snapshots, "snapshot", nil, "read the file of an etcd snapshot; may be repeated")
	f.StringVar(&s.prefix, "prefix", usage.DefaultPrefix, "kube-apiserver's --etcd-prefix")
	for _, name := range []string{"cacert", "cert", "key", "snapshot"} {
		_ = cmd.MarkFlagFilename(name)
	}
}

// read reads every store that is named, or this machine's etcd.
func (s *stores) read(cmd *cobra.Command) (reports []*usage.Report, err error) {
	prefix := "/" + strings.Trim(s.prefix, "/")
	etcds, err := s.etcd()
	if err != nil {
		return nil, files.HintRoot(err)
	}
	for _, e := range etcds {
		progress, done := progressOn(cmd.ErrOrStderr(), "objects")
		r, err := e.Read(cmd.Context(), prefix, progress)
		if done(); err != nil {
			return nil, files.HintRoot(err)
		}
		reports = append(reports, r)
	}
	for _, file := range s.snapshots {
		progress, done := progressOn(cmd.ErrOrStderr(), "revisions")
		r, err := usage.Snapshot(cmd.Context(), file, prefix, progress)
		if done(); err != nil {
			return nil, files.HintRoot(err)
		}
		reports = append(reports, r)
	}
	return reports, nil
}

func (s *stores) etcd() (all []*usage.Etcd, err error) {
	if (s.certFile == "") != (s.keyFile == "") {
		return nil, errors.New("--cert and --key go together")
	}
	if len(s.etcds) == 0 && s.caFile == "" && s.certFile == "" {
		if len(s.snapshots) > 0 && !s.live {
			return nil, nil
		}
		found, err := usage.Find("/")
		if err != nil {
			return nil, err
		}
		return []*usage.Etcd{found}, nil
	}
	if len(s.etcds) == 0 {
		return nil, errors.New("--cacert, --cert and --key go with --etcd")
	}
	for _, urls := range s.etcds {
		all = append(all, &usage.Etcd{Endpoints: strings.Split(urls, ","), CAFile: s.caFile, CertFile: s.certFile, KeyFile: s.keyFile})
	}
	return all, nil
}

func newUsage(a *app) *cobra.Command {
	var from stores
	var keyID string
	var all bool
	cmd := &cobra.Command{
		Use:   "usage",
		Short: "Count which stored objects are under which key",
		Long: `Count which stored objects of Kubernetes are under which key, by resource: under the
current KEK, under a retired one, under another provider, or in clear. The command reads
etcd, or the file of an etcd snapshot. It decrypts nothing and changes nothing.

Without --etcd and --snapshot it reads the etcd of this control-plane node, with the
client certificate that kubeadm, RKE2 or k3s keeps there. A snapshot needs no
credentials, and no machine of the cluster.

A resource counts as encrypted if one of its objects is, or if --resources names it. The
exit code is 0 if every object of these resources is under the current KEK, 4 if one is
not, or if the current KEK is not known, and 1 if a store could not be read. The current
KEK is that of the running kleidi serve, else of the stored keyring; --key-id names
another.`,
		Example: `  # on a control-plane node
  kleidi usage

  # anywhere, from a backup
  kleidi usage --snapshot FILE --key-id k1-…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			roles := map[string]string{}
			var unknown error
			if keyID == "" {
				if roles, unknown = a.keyRoles(cmd.Context()); unknown == nil {
					keyID = currentOf(roles)
				}
			}
			reports, err := from.read(cmd)
			if err != nil {
				return err
			}
			u := usage.Compare(reports, keyID, from.resources)
			if err := a.show(cmd.OutOrStdout(), u, func(w io.Writer) { printUsage(w, u, roles, from.resources, all) }); err != nil {
				return err
			}
			if unknown != nil {
				fmt.Fprintln(cmd.ErrOrStderr(), "nothing was compared with the current KEK, since no keyring could be read:", unknown)
				fmt.Fprintln(cmd.ErrOrStderr(), "  -> name its key ID with --key-id")
			}
			if unknown != nil || u.Left > 0 {
				return &exitError{code: exitProblem}
			}
			return nil
		},
	}
	from.addFlags(cmd)
	cmd.Flags().StringSliceVar(&from.resources, "resources", []string{"secrets"}, "resources that should be encrypted, even if all of their objects are in clear")
	cmd.Flags().StringVar(&keyID, "key-id", "", "the key ID that everything should be under (default the current one)")
	a.completeFlag(cmd, "key-id", keyIDs)
	cmd.Flags().BoolVar(&all, "all", false, "list also the resources that are in clear throughout")
	return cmd
}

// keyRoles returns the key IDs of the keyring that the running serve holds open, else of
// the stored one, which nothing has vouched for.
func (a *app) keyRoles(ctx context.Context) (map[string]string, error) {
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	roles := map[string]string{}
	if client, err := admin.Dial(ctx, cfg.Admin.Socket); err == nil {
		r, err := admin.Call(ctx, client, admin.Status, admin.StatusRequest{})
		if err != nil {
			return nil, err
		}
		for _, k := range r.Keys {
			roles[string(k.KeyID)] = k.Role
		}
		if r.CurrentKeyID != "" {
			return roles, nil
		}
	} else if !errors.Is(err, admin.ErrNotRunning) {
		return nil, err
	}
	u, _, err := lifecycle.ReadStored(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return rolesOf(u), nil
}

// Roles of key IDs, as in [admin.KeyReport].
const (
	roleCurrent = "current"
	roleStaged  = "staged"
	roleRetired = "retired"
)

func rolesOf(u *keyring.Untrusted) map[string]string {
	i := u.Info()
	roles := map[string]string{string(i.Current.KeyID): roleCurrent}
	if i.Staged != nil {
		roles[string(i.Staged.KeyID)] = roleStaged
	}
	for _, r := range i.Retired {
		roles[string(r.KeyID)] = roleRetired
	}
	return roles
}

func currentOf(roles map[string]string) string {
	for id, role := range roles {
		if role == roleCurrent {
			return id
		}
	}
	return ""
}

func printUsage(w io.Writer, u usage.Usage, roles map[string]string, named []string, all bool) {
	for i, s := range u.Stores {
		if i > 0 {
			fmt.Fprintln(w)
		}
		about := fmt.Sprintf("revision %d, %s", s.Revision, counted(s.Objects, "object"))
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
					role = roleCurrent
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
			fmt.Fprintf(w, "%s with %s in clear throughout; --all lists them\n", counted(clear, "more resource"), counted(inClear, "object"))
		}
	}
	switch {
	case u.KeyID == "":
	case u.Left == 0:
		fmt.Fprintln(w, "\nevery object of these resources is under the current key ID", u.KeyID)
	case u.Left == 1:
		fmt.Fprintln(w, "\n1 object is not under the current key ID", u.KeyID)
	default:
		fmt.Fprintf(w, "\n%d objects are not under the current key ID %s\n", u.Left, u.KeyID)
	}
}

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func describeProvider(k usage.Key) string {
	switch {
	case k.Provider == usage.Identity:
		return "identity (in clear)"
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

// progressEvery bounds how often a terminal is written to.
const progressEvery = 200 * time.Millisecond

// progressOn returns a function that shows on a terminal how much was read. done wipes
// the line.
func progressOn(w io.Writer, what string) (progress usage.Progress, done func()) {
	f, ok := w.(*os.File)
	if !ok || !isTerminal(f) {
		return nil, func() {}
	}
	var last time.Time
	progress = func(read, total int64) {
		if time.Since(last) < progressEvery {
			return
		}
		last = time.Now()
		if total > 0 {
			fmt.Fprintf(w, "\r\x1b[K%d %%", 100*read/total)
			return
		}
		fmt.Fprintf(w, "\r\x1b[K%d %s", read, what)
	}
	return progress, func() { fmt.Fprint(w, "\r\x1b[K") }
}

func newKeyringCheck(a *app) *cobra.Command {
	var snapshots []string
	var prefix, file string
	cmd := &cobra.Command{
		Use:   "check --snapshot FILE",
		Short: "Say whether the keyring opens everything in an etcd snapshot",
		Long: `Say before a restore whether the keyring holds every key ID under which the objects
of an etcd snapshot are encrypted, and which key IDs are missing. Without --keyring the
command checks the keyring of the running kleidi serve, else the stored one. It opens no
keyring; kleidi keyring verify does that.

The exit code is 0 if no key ID is missing, 4 if one is, and 1 if the snapshot or the
keyring could not be read.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			roles, err := a.rolesIn(cmd.Context(), file)
			if err != nil {
				return err
			}
			s := stores{snapshots: snapshots, prefix: prefix}
			reports, err := s.read(cmd)
			if err != nil {
				return err
			}
			result := checkedKeyring{Snapshots: []usage.Opening{}}
			missing := 0
			for _, r := range reports {
				o := usage.Opens(r, roles)
				missing += o.Missing
				result.Snapshots = append(result.Snapshots, o)
			}
			if err := a.show(cmd.OutOrStdout(), result, func(w io.Writer) { printOpenings(w, result.Snapshots) }); err != nil {
				return err
			}
			if missing > 0 {
				return &exitError{code: exitProblem}
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&snapshots, "snapshot", nil, "the file of an etcd snapshot; may be repeated")
	cmd.Flags().StringVar(&file, "keyring", "", "check this copy of a keyring")
	cmd.Flags().StringVar(&prefix, "prefix", usage.DefaultPrefix, "kube-apiserver's --etcd-prefix")
	_ = cmd.MarkFlagRequired("snapshot")
	_ = cmd.MarkFlagFilename("snapshot")
	_ = cmd.MarkFlagFilename("keyring", "json")
	return cmd
}

// rolesIn returns the key IDs of a copy of a keyring, or without a file of this
// machine's.
func (a *app) rolesIn(ctx context.Context, file string) (map[string]string, error) {
	if file == "" {
		return a.keyRoles(ctx)
	}
	b, err := files.Read(file, keyring.MaxSize)
	if err != nil {
		return nil, files.HintRoot(err)
	}
	u, err := keyring.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return rolesOf(u), nil
}

func printOpenings(w io.Writer, all []usage.Opening) {
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
			fmt.Fprintf(t, "%s\t%s\t%s\tplugin %s\n", role, seal.OneLine(k.KeyID, 100), counted(k.Objects, "object"), seal.OneLine(k.Plugin, 100))
		}
		t.Flush()
		if o.Other > 0 {
			fmt.Fprintf(w, "%s under another provider, whose keys kleidi does not know\n", counted(o.Other, "object"))
		}
		switch {
		case o.Foreign():
			fmt.Fprintln(w, "the keyring holds none of these key IDs: the snapshot is of another cluster, or the keyring is")
			fmt.Fprintln(w, "  -> name the right copy of the keyring with --keyring")
		case o.Missing > 0:
			fmt.Fprintf(w, "%s would not open after a restore\n", counted(o.Missing, "object"))
			fmt.Fprintln(w, "  -> look for a copy of the keyring that was made after the snapshot, and check it with --keyring")
		default:
			fmt.Fprintln(w, "the keyring holds every key ID of KMS v2 in this snapshot")
		}
	}
}
