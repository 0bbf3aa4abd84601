package clusteraccess

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/beezy-dev/kleidi/deploy/cluster"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// Setup says how to set up the access.
type Setup struct {
	// Admin is the path of an administrator's kubeconfig.
	Admin string
	// Server is the URL of the API for this node. If empty, it is this machine's own
	// kube-apiserver if one answers, or else the administrator's server.
	Server string
	// KeyInFile keeps the key in a file even if there is a TPM.
	KeyInFile bool
}

// Result is the result of kleidi cluster setup.
type Result struct {
	Node        string    `json:"node"`
	User        string    `json:"user"`
	Server      string    `json:"server"`
	Kubeconfig  string    `json:"kubeconfig"`
	Certificate string    `json:"certificate"`
	NotAfter    time.Time `json:"notAfter"`
	Key         string    `json:"key"`
	KeyInTPM    bool      `json:"keyInTPM"`
	// WhyFile says why the key is not in the TPM.
	WhyFile string   `json:"whyFile,omitempty"`
	Changes []string `json:"changes"`
	// Configured says that cluster.kubeconfig is set.
	Configured bool `json:"configured"`
}

// Manifests returns what SetUp applies, as YAML.
func (a *Access) Manifests() string { return cluster.CRDs + "---\n" + cluster.Node(a.Node) }

// SetUp applies the resources and this node's role, has a client certificate signed, and
// writes the kubeconfig. At the end it reads the cluster store with the node's own
// rights. It changes nothing that already works.
func (a *Access) SetUp(ctx context.Context, s Setup) (*Result, error) {
	if !objectName.MatchString(a.Node) {
		return nil, fmt.Errorf("the API accepts no object named %q; set node to a name of lower-case letters, digits, dots and hyphens", a.Node)
	}
	if theirs, err := os.Stat(s.Admin); err == nil {
		if own, err := os.Stat(a.Kubeconfig); err == nil && os.SameFile(theirs, own) {
			return nil, fmt.Errorf("cluster.kubeconfig is the administrator's kubeconfig, %s, and the command would overwrite it; remove cluster.kubeconfig from the configuration", s.Admin)
		}
	}
	admin, err := kube.NewClient(kube.Options{Kubeconfig: s.Admin})
	if err != nil {
		return nil, err
	}
	from, err := kube.ReadKubeconfig(s.Admin)
	if err != nil {
		return nil, err
	}
	to, err := chooseServer(ctx, from, s.Server)
	if err != nil {
		return nil, err
	}
	if err := admin.Apply(ctx, a.Manifests()); err != nil {
		return nil, a.hintAdmin(err)
	}
	if err := a.checkStoredInClear(ctx, admin); err != nil {
		return nil, err
	}
	dir := filepath.Dir(a.Kubeconfig)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := ownership.CheckFolder(dir); err != nil {
		return nil, err
	}
	r := &Result{Node: a.Node, User: a.User(), Server: to.Server, Kubeconfig: a.Kubeconfig, Certificate: a.beside(extCertificate), Changes: []string{}}
	k, err := a.takeKey(ctx, s.KeyInFile)
	if err != nil {
		return nil, err
	}
	r.Key, r.KeyInTPM, r.WhyFile = k.path, k.inTPM, k.whyFile
	if k.made {
		r.Changes = append(r.Changes, "made a key, "+r.Key)
	}
	if err := a.settle(ctx, admin, to, k, r); err != nil {
		return r, a.hintAdmin(err)
	}
	return r, k.removeOther(a)
}

// objectName matches a name that the API accepts for an object, a DNS name.
var objectName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// settle writes the kubeconfig, and has a certificate signed unless there is a good one.
func (a *Access) settle(ctx context.Context, admin *kube.Client, to *kube.Kubeconfig, k *key, r *Result) error {
	to.CertFile, to.KeyFile = r.Certificate, k.path
	kubeconfig, err := to.YAML(a.User())
	if err != nil {
		return err
	}
	if old, err := files.Read(a.Kubeconfig, int64(2*len(kubeconfig))); err != nil || !bytes.Equal(old, kubeconfig) {
		if err := files.Replace(a.Kubeconfig, kubeconfig); err != nil {
			return err
		}
		r.Changes = append(r.Changes, "wrote "+a.Kubeconfig)
	}
	if err := a.good(ctx); err != nil {
		b, err := a.obtain(ctx, admin, k)
		if err != nil {
			return err
		}
		if err := files.Replace(r.Certificate, b); err != nil {
			return err
		}
		r.Changes = append(r.Changes, "had a certificate signed, "+r.Certificate)
		if err := a.reaches(ctx); err != nil {
			return fmt.Errorf("user %s can't read the cluster store at %s: %w", a.User(), r.Server, err)
		}
	}
	c, err := a.Certificate(ctx)
	if err != nil {
		return err
	}
	r.NotAfter = c.Leaf.NotAfter
	return nil
}

// good returns nil if the present certificate can stay.
func (a *Access) good(ctx context.Context) error {
	c, err := a.Certificate(ctx)
	if err != nil {
		return err
	}
	if err := a.check(c.Leaf); err != nil {
		return err
	}
	if time.Now().After(due(c.Leaf)) {
		return errors.New("the certificate ends soon")
	}
	return a.ping(ctx)
}

func (a *Access) ping(ctx context.Context) error {
	c, err := a.newClient()
	if err != nil {
		return err
	}
	return (&kube.Store{Client: c}).Ping(ctx)
}

// reachesWithin bounds how long kube-apiserver takes to see a new role.
const reachesWithin = 15 * time.Second

// reaches reads the cluster store with the node's own rights.
func (a *Access) reaches(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, reachesWithin)
	defer cancel()
	for {
		err := a.ping(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// hintAdmin adds to a refusal of the API a hint that names who has the right.
func (a *Access) hintAdmin(err error) error {
	if kube.Refused(err, http.StatusForbidden) || kube.Refused(err, http.StatusUnauthorized) {
		return seal.Errorf(seal.CauseCredentials, "name the kubeconfig of a cluster administrator in --kubeconfig; kubeadm's is /etc/kubernetes/admin.conf", "%w", err)
	}
	return err
}

// chooseServer returns the API at the server for the node's kubeconfig: the named one, or
// this machine's own kube-apiserver if it answers, or else that of from.
func chooseServer(ctx context.Context, from *kube.Kubeconfig, server string) (*kube.Kubeconfig, error) {
	if server != "" {
		return from.At(server)
	}
	local := from.Local()
	if local == nil {
		return from, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if local.Dial(ctx) != nil {
		return from, nil
	}
	return local, nil
}
