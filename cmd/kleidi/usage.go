package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/prune"
	"github.com/beezy-dev/kleidi/internal/terminal"
	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/internal/usage/usagetext"
	"github.com/beezy-dev/kleidi/internal/usage/wanted"
	"github.com/beezy-dev/kleidi/seal"
)

// stores holds the flags that name the stores to read.
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
	fileFlags(cmd, "cacert", "cert", "key", "snapshot")
}

// read reads every named store, or this machine's etcd.
func (s *stores) read(cmd *cobra.Command) (reports []*usage.Report, err error) {
	prefix := "/" + strings.Trim(s.prefix, "/")
	etcds, err := s.etcd()
	if err != nil {
		return nil, files.HintRoot(err)
	}
	for _, e := range etcds {
		progress, done := terminal.Progress(cmd.ErrOrStderr(), "objects")
		r, err := e.Read(cmd.Context(), prefix, progress)
		if done(); err != nil {
			return nil, files.HintRoot(err)
		}
		reports = append(reports, r)
	}
	for _, file := range s.snapshots {
		progress, done := terminal.Progress(cmd.ErrOrStderr(), "revisions")
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

// counting holds the flags of usage.
type counting struct {
	from stores
	// keyID is the key ID to compare with, and file an EncryptionConfiguration.
	keyID, file string
	all         bool
}

func newUsage(a *app) *cobra.Command {
	var o counting
	cmd := &cobra.Command{
		Use:   "usage",
		Short: "Count which stored objects are under which key",
		Long: `Count which stored objects of Kubernetes are under which key, by resource: under the
current KEK, under a retired one, under another provider, or in the clear. The command reads
etcd, or the file of an etcd snapshot. It decrypts nothing and changes nothing.

Without --etcd and --snapshot it reads the etcd of this control-plane node, with the
client certificate that kubeadm, RKE2 or k3s keeps there. A snapshot needs no
credentials, and no machine of the cluster.

A resource counts as encrypted if one of its objects is, or if --resources names it. The
exit code is 0 if every object of these resources is under the current KEK, 4 if one is
not, or if the current KEK is not known, and 1 if a store could not be read. The current
KEK is that of the running kleidi serve, else of the stored keyring; --key-id names
another.

With --encryption-config the exit code is 0 if every object is stored as kube-apiserver
with that EncryptionConfiguration writes it: with the first provider of its resource, and
in the clear if no entry names the resource.`,
		Example: `  # on a control-plane node
  kleidi usage

  # anywhere, from a backup
  kleidi usage --snapshot FILE --key-id k1-…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd, a) },
	}
	o.from.addFlags(cmd)
	cmd.Flags().StringSliceVar(&o.from.resources, "resources", []string{"secrets"}, "resources that should be encrypted, even if all of their objects are in the clear")
	cmd.Flags().StringVar(&o.keyID, "key-id", "", "the key ID that everything should be under (default the current one)")
	a.completeFlag(cmd, "key-id", completion.KeyIDs)
	cmd.Flags().StringVar(&o.file, "encryption-config", "", "compare with how kube-apiserver writes with this EncryptionConfiguration")
	cmd.MarkFlagsMutuallyExclusive("encryption-config", "resources")
	_ = cmd.MarkFlagFilename("encryption-config")
	cmd.Flags().BoolVar(&o.all, "all", false, "list also the resources that are in the clear throughout")
	return cmd
}

// run counts, and shows the counts. The exit code is exitProblem as well if the current
// KEK is not known: counts that were compared with nothing must not look like success.
func (o *counting) run(cmd *cobra.Command, a *app) error {
	roles := map[string]string{}
	var unknown error
	ask, err := a.wanted(o.file)
	if err != nil {
		return err
	}
	if o.keyID == "" {
		if roles, unknown = a.keyRoles(cmd.Context()); unknown == nil {
			o.keyID = lifecycle.CurrentOf(roles)
		}
	}
	reports, err := o.from.read(cmd)
	if err != nil {
		return err
	}
	u := usage.Compare(reports, o.keyID, o.from.resources)
	shown := o.from.resources
	if ask != nil {
		w := ask(o.keyID)
		if !w.NeedsKeyID() {
			unknown = nil
		}
		u, shown = w.Compare(reports, o.file), w.Covered(reports)
	}
	if err := a.show(cmd.OutOrStdout(), u, func(w io.Writer) { usagetext.Usage(w, u, roles, shown, o.all) }); err != nil {
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
}

// wanted reads an EncryptionConfiguration, if one is named, and returns its demands for a
// key ID.
func (a *app) wanted(file string) (func(keyID string) *wanted.Wanted, error) {
	if file == "" {
		return nil, nil
	}
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	e, err := encryptionconfig.Read(file)
	if err != nil {
		return nil, files.HintRoot(err)
	}
	return func(keyID string) *wanted.Wanted { return wanted.New(e, c.KMS.Socket, keyID) }, nil
}

// keyRoles returns the key IDs of this machine's keyring.
func (a *app) keyRoles(ctx context.Context) (map[string]string, error) {
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	return lifecycle.KeyRoles(ctx, cfg)
}

// checking holds the flags of keyring check.
type checking struct {
	from     stores
	archives []string
	file     string // a copy of a keyring
}

func newKeyringCheck(a *app) *cobra.Command {
	var o checking
	cmd := &cobra.Command{
		Use:   "check --snapshot FILE",
		Short: "Say whether the keyring opens everything in an etcd snapshot",
		Long: `Say before a restore whether the keyring holds every key ID under which the objects
of an etcd snapshot are encrypted, and which key IDs are missing. Without --keyring the
command checks the keyring of the running kleidi serve, else the stored one. It opens no
keyring; kleidi keyring verify does that.

If a KEK is missing because kleidi prune removed it, the command names its archive. It
looks in the files that --archive names, beside the stored keyring, and in the cluster
store if kleidi serve runs.

The exit code is 0 if no key ID is missing, 4 if one is, and 1 if the snapshot or the
keyring could not be read.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd, a) },
	}
	cmd.Flags().StringArrayVar(&o.from.snapshots, "snapshot", nil, "the file of an etcd snapshot; may be repeated")
	cmd.Flags().StringVar(&o.file, "keyring", "", "check this copy of a keyring")
	cmd.Flags().StringVar(&o.from.prefix, "prefix", usage.DefaultPrefix, "kube-apiserver's --etcd-prefix")
	cmd.Flags().StringArrayVar(&o.archives, "archive", nil, "the file of an archive of a KEK that was removed; may be repeated")
	_ = cmd.MarkFlagFilename("archive", "json")
	_ = cmd.MarkFlagRequired("snapshot")
	_ = cmd.MarkFlagFilename("snapshot")
	_ = cmd.MarkFlagFilename("keyring", "json")
	return cmd
}

// run compares the key IDs in every snapshot with the keyring's. A machine without a
// configuration has no archives.
func (o *checking) run(cmd *cobra.Command, a *app) error {
	roles, err := a.rolesIn(cmd.Context(), o.file)
	if err != nil {
		return err
	}
	reports, err := o.from.read(cmd)
	if err != nil {
		return err
	}
	cfg, err := a.config()
	if err != nil {
		cfg = nil
	}
	result := checkedKeyring{Snapshots: []usage.Opening{}}
	missing := 0
	for _, r := range reports {
		opens := usage.Opens(r, roles)
		if err := prune.FindArchives(cmd.Context(), cfg, opens.KeyIDs, o.archives); err != nil {
			return err
		}
		missing += opens.Missing
		result.Snapshots = append(result.Snapshots, opens)
	}
	if err := a.show(cmd.OutOrStdout(), result, func(w io.Writer) { usagetext.Openings(w, result.Snapshots) }); err != nil {
		return err
	}
	if missing > 0 {
		return &exitError{code: exitProblem}
	}
	return nil
}

// rolesIn returns the key IDs of a copy of a keyring or, without a file, of this
// machine's keyring.
func (a *app) rolesIn(ctx context.Context, file string) (map[string]string, error) {
	if file != "" {
		return lifecycle.RolesIn(file)
	}
	roles, err := a.keyRoles(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		err = seal.WithHint(err, "name a copy of the keyring with --keyring, such as one that kleidi keyring backup FILE has written")
	}
	return roles, err
}
