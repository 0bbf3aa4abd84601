package clusteraccess

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/deploy/cluster"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// inFile returns the access of cp-1, without a TPM.
func inFile(t *testing.T) *Access {
	t.Helper()
	return &Access{Node: "cp-1", Kubeconfig: filepath.Join(t.TempDir(), "kleidi", "cluster.kubeconfig")}
}

// setUp gives an access to the API.
func setUp(t *testing.T, api *api, a *Access) *Result {
	t.Helper()
	r, err := a.SetUp(t.Context(), Setup{Admin: api.admin(adminToken), KeyInFile: true})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func refuses(t *testing.T, what string, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no refusal", what)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v; want %q", what, err, part)
		}
	}
}

// TestSetUp: a node gets the resources, a key, a certificate and a kubeconfig, all readable
// by root alone, and reaches the API with them. A second time nothing changes, until the
// certificate ends soon.
func TestSetUp(t *testing.T) {
	api, a := startAPI(t), inFile(t)
	r := setUp(t, api, a)
	if r.User != "kleidi:node:cp-1" || r.KeyInTPM || r.WhyFile != "--key-in-file was given" || r.Server != api.server.URL || time.Until(r.NotAfter) < 300*24*time.Hour {
		t.Errorf("%+v", r)
	}
	if want := []string{"made a key, " + r.Key, "wrote " + a.Kubeconfig, "had a certificate signed, " + r.Certificate}; !slices.Equal(r.Changes, want) {
		t.Errorf("%q, want %q", r.Changes, want)
	}
	for _, path := range []string{a.Kubeconfig, r.Key, r.Certificate} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 && path == r.Key || !slices.Contains(a.Files(), path) {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	if applied := api.objects(); !slices.Contains(applied, "clusterrolebindings/kleidi-node-cp-1") || !slices.Contains(applied, "customresourcedefinitions/keyrings."+kube.Group) {
		t.Errorf("applied %q", applied)
	}
	if err := a.ping(t.Context()); err != nil {
		t.Errorf("with the node's own rights: %v", err)
	}
	client, err := a.Client()
	if again, err2 := a.Client(); err != nil || err2 != nil || again != client {
		t.Errorf("another client: %v, %v", err, err2)
	}
	if again := setUp(t, api, a); len(again.Changes) != 0 {
		t.Errorf("again: %q", again.Changes)
	}
	api.change(func() { api.template = shortLived })
	if err := os.Remove(r.Certificate); err != nil {
		t.Fatal(err)
	}
	setUp(t, api, a)
	api.change(func() { api.template = nil })
	if again := setUp(t, api, a); len(again.Changes) != 1 || time.Until(again.NotAfter) < 300*24*time.Hour {
		t.Errorf("once it ends soon: %+v", again)
	}
}

// TestSetUpRefused: what the setup refuses, and what it does not do then.
func TestSetUpRefused(t *testing.T) {
	api := startAPI(t)
	admin := api.admin(adminToken)
	upper := inFile(t)
	upper.Node = "CP_1"
	_, err := upper.SetUp(t.Context(), Setup{Admin: admin})
	refuses(t, "the name", err, `no object named "CP_1"`, "set node to")
	own := &Access{Node: "cp-1", Kubeconfig: admin}
	before, readErr := os.ReadFile(admin)
	_, err = own.SetUp(t.Context(), Setup{Admin: admin, KeyInFile: true})
	refuses(t, "the administrator's kubeconfig", err, "the command would overwrite it")
	if after, err := os.ReadFile(admin); err != nil || readErr != nil || !bytes.Equal(after, before) {
		t.Errorf("the administrator's kubeconfig has changed: %v, %v", err, readErr)
	}
	if applied := api.objects(); len(applied) != 0 {
		t.Errorf("applied %q", applied)
	}
	a := inFile(t)
	_, err = a.SetUp(t.Context(), Setup{Admin: api.admin("nobody"), KeyInFile: true})
	refuses(t, "no administrator", err, "name the kubeconfig of a cluster administrator in --kubeconfig")
	if seal.CauseOf(err) != seal.CauseCredentials {
		t.Errorf("cause %q", seal.CauseOf(err))
	}
	api.change(func() { api.encrypts = true })
	_, err = a.SetUp(t.Context(), Setup{Admin: admin, KeyInFile: true})
	refuses(t, "an encrypted store", err, "with the provider identity before all others", "kube-apiserver encrypts the cluster store itself")
	if _, err := os.Stat(a.Kubeconfig); err == nil || api.pending("cp-1") != nil {
		t.Error("a refused setup has made a kubeconfig, or a request")
	}
}

// TestObtain: only a request that this process has just made is approved, and only a
// certificate for its key and this node alone is taken.
func TestObtain(t *testing.T) {
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	subject := pkix.Name{CommonName: "kleidi:node:cp-1"}
	for name, row := range map[string]struct {
		change func(*api)
		says   string
	}{
		"replaced": {func(a *api) {
			a.asked = func(r *signingRequest) { r.Spec.SignerName = "kubernetes.io/kubelet-serving" }
		}, "was replaced meanwhile; nothing was approved"},
		"denied": {func(a *api) {
			a.unsigned, a.approved = true, func(r *signingRequest) {
				r.Status.Conditions = append(r.Status.Conditions, condition{Type: "Denied", Message: "not today"})
			}
		}, "Denied: not today"},
		"another key": {func(a *api) {
			a.approved = func(r *signingRequest) { r.Status.Certificate = a.sign(subject, other.Public()) }
		}, "a certificate for another key"},
		"another user": {func(a *api) { a.template = func(c *x509.Certificate) { c.Subject.CommonName = "kleidi:node:cp-2" } }, `it is for user "kleidi:node:cp-2"`},
		"masters": {func(a *api) {
			a.template = func(c *x509.Certificate) { c.Subject.Organization = []string{"system:masters"} }
		}, "it is for members of"},
		"no PEM":        {func(a *api) { a.approved = func(r *signingRequest) { r.Status.Certificate = []byte("damaged") } }, "no certificate in PEM"},
		"gone meantime": {func(a *api) { a.unsigned, a.approved = true, func(*signingRequest) { clear(a.requests) } }, "is gone"},
	} {
		api, a := startAPI(t), inFile(t)
		row.change(api)
		_, err := a.SetUp(t.Context(), Setup{Admin: api.admin(adminToken), KeyInFile: true})
		refuses(t, name, err, row.says)
		if _, err := os.Stat(a.beside(extCertificate)); err == nil {
			t.Errorf("%s: the certificate is taken", name)
		}
		if r := api.pending("cp-1"); name == "replaced" && (r == nil || r.is("Approved") != nil) {
			t.Errorf("%s: approved", name)
		}
	}
}

// TestEarlierRequest: a request that somebody else left under the node's name is deleted,
// not approved.
func TestEarlierRequest(t *testing.T) {
	api, a := startAPI(t), inFile(t)
	left := &signingRequest{Metadata: map[string]any{"name": cluster.RequestName("cp-1")}}
	api.change(func() { api.requests[cluster.RequestName("cp-1")] = left })
	setUp(t, api, a)
	if now := api.pending("cp-1"); now == left || left.is("Approved") != nil {
		t.Error("the earlier request is approved")
	}
}

// TestRenew: a certificate that ends soon is renewed through a request, which waits for an
// administrator. The reason why it is not renewed yet is what an operator can act on.
func TestRenew(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	api, a := startAPI(t), inFile(t)
	if _, err := a.renew(t.Context(), log); err != nil || !a.State().NotAfter.IsZero() {
		t.Errorf("without a certificate: %+v, %v", a.State(), err)
	}
	r := setUp(t, api, a)
	api.change(func() { clear(api.requests) })
	if next, err := a.renew(t.Context(), log); err != nil || next != lookEvery || !a.State().NotAfter.Equal(r.NotAfter) || api.pending("cp-1") != nil {
		t.Errorf("a new certificate: next in %v, %+v, %v", next, a.State(), err)
	}
	api.change(func() { api.template = shortLived })
	if err := os.Remove(r.Certificate); err != nil {
		t.Fatal(err)
	}
	short := setUp(t, api, a)
	left := api.pending("cp-1")
	_, err := a.renew(t.Context(), log)
	refuses(t, "the last renewal's request", err, "is left from the last renewal")
	api.change(func() { api.template = nil; clear(api.requests) })
	for range 2 {
		next, err := a.renew(t.Context(), log)
		refuses(t, "no approval", err, "waits for an administrator's approval", "run kleidi cluster setup")
		if next > askEvery {
			t.Errorf("it asks again in %v", next)
		}
	}
	asked := api.pending("cp-1")
	if asked == nil || asked == left {
		t.Fatal("no request was made")
	}
	api.change(func() { asked.Status.Conditions = []condition{{Type: "Denied", Message: "not today"}} })
	_, err = a.renew(t.Context(), log)
	refuses(t, "denied", err, "Denied: not today")
	api.change(func() { asked.Status.Conditions = nil; asked.Spec.SignerName = "another" })
	_, err = a.renew(t.Context(), log)
	refuses(t, "another's request", err, "is not for this node's key", "run kleidi cluster setup")
	api.change(func() { asked.Spec.SignerName = signer; api.approve(asked) })
	s := a.Store() // its connection stays open
	if _, err := s.Load(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("with the present certificate: %v", err)
	}
	if _, err := a.renew(t.Context(), log); err != nil {
		t.Fatal(err)
	}
	c, _, err := a.Leaf()
	if err != nil || !c.NotAfter.After(short.NotAfter) {
		t.Fatalf("the certificate is not the approved one: %v", err)
	}
	if _, err := s.Load(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("with the renewed certificate: %v", err)
	}
	api.change(func() {
		if api.shown.Cmp(c.SerialNumber) != 0 {
			t.Errorf("the API is shown certificate %v, want the renewed one, %v", api.shown, c.SerialNumber)
		}
	})
}

// TestNotRenewed: an ended certificate, and one that an operator made for more than this
// node, are not renewed, and no request is made.
func TestNotRenewed(t *testing.T) {
	for name, row := range map[string]struct {
		template func(*x509.Certificate)
		says     string
	}{
		"ended":   {func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, "it has ended; run kleidi cluster setup"},
		"masters": {func(c *x509.Certificate) { shortLived(c); c.Subject.Organization = []string{"system:masters"} }, "kleidi renews its own certificates only"},
	} {
		api, a := startAPI(t), inFile(t)
		setUp(t, api, a)
		c, path, err := a.Leaf()
		if err != nil {
			t.Fatal(err)
		}
		api.change(func() { api.template = row.template; clear(api.requests) })
		if err := os.WriteFile(path, api.sign(c.Subject, c.PublicKey), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = a.renew(t.Context(), slog.New(slog.DiscardHandler))
		refuses(t, name, err, row.says)
		if api.pending("cp-1") != nil {
			t.Errorf("%s: a request was made", name)
		}
	}
}

// TestDue: a certificate is renewed a month before its end, or in the last third of a
// shorter life.
func TestDue(t *testing.T) {
	begin := time.Unix(1_000_000_000, 0)
	for life, want := range map[time.Duration]time.Duration{365 * 24 * time.Hour: 30 * 24 * time.Hour, time.Hour + backdated: 20 * time.Minute, time.Minute: 0} {
		c := &x509.Certificate{NotBefore: begin, NotAfter: begin.Add(life)}
		if got := c.NotAfter.Sub(due(c)); got != want {
			t.Errorf("of %v: %v before the end, want %v", life, got, want)
		}
	}
}

// TestCut: an administrator takes a node's rights away, and a node without rights is fine.
// A node's own rights are not enough.
func TestCut(t *testing.T) {
	api, a := startAPI(t), inFile(t)
	setUp(t, api, a)
	api.change(func() { api.bindings[cluster.BindingName("cp-2")] = true })
	if err := a.Cut(t.Context(), "", "cp-2"); !kube.Refused(err, 403) || !api.bound("cp-2") {
		t.Errorf("with the node's own rights: %v", err)
	}
	for range 2 {
		if err := a.Cut(t.Context(), api.admin(adminToken), "cp-2"); err != nil || api.bound("cp-2") {
			t.Errorf("as an administrator: %v", err)
		}
	}
	if got := CutCommand("cp-2"); got != "kubectl delete clusterrolebinding kleidi-node-cp-2" {
		t.Error(got)
	}
}

// TestOperatorsKubeconfig: a kubeconfig whose user has no certificate in a file works, and
// has nothing to renew. One that others may write to is not believed.
func TestOperatorsKubeconfig(t *testing.T) {
	api := startAPI(t)
	a := &Access{Node: "cp-1", Kubeconfig: api.admin(adminToken)}
	if err := a.ping(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := a.Certificate(t.Context()); !errors.Is(err, errNoFiles) {
		t.Errorf("%v", err)
	}
	if err := os.Chmod(a.Kubeconfig, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Client(); err == nil || !strings.Contains(err.Error(), a.Kubeconfig) {
		t.Errorf("%v", err)
	}
}

// TestChooseServer: a named server counts. The API on this machine's loopback is its own.
func TestChooseServer(t *testing.T) {
	api := startAPI(t)
	from, err := kube.ReadKubeconfig(api.admin(adminToken))
	if err != nil {
		t.Fatal(err)
	}
	if to, err := chooseServer(t.Context(), from, "https://api.example:6443"); err != nil || to.Server != "https://api.example:6443" || to.ServerName == "" {
		t.Errorf("%+v, %v", to, err)
	}
	if to, err := chooseServer(t.Context(), from, ""); err != nil || to.Server != api.server.URL {
		t.Errorf("%+v, %v", to, err)
	}
}

// TestSummaries: kubectl shows a keyring's revision, key IDs and number of nodes.
func TestSummaries(t *testing.T) {
	newKEK := func() *seal.Secret {
		kek, err := seal.Memory{}.NewKEK()
		if err != nil {
			t.Fatal(err)
		}
		return kek
	}
	slots := []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}}
	ek := "sha256:" + strings.Repeat("ab", 32)
	k, err := keyring.New(seal.ClusterID{1}, newKEK(), slots, []keyring.Node{{Name: "cp-1", EK: ek}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	staged, err := k.Stage(newKEK(), slots, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer staged.Close()
	if s := summarize(k.Marshal()); s["revision"] != k.Revision() || s["current"] != k.CurrentID() || s["nodes"] != 1 || s["staged"] != nil {
		t.Errorf("%v", s)
	}
	if s := summarize(staged.Marshal()); s["staged"] != staged.StagedID() {
		t.Errorf("%v", s)
	}
	record, err := k.SignRecord(keyring.Record{
		Node: "cp-1", Formats: keyring.Formats(), Version: "2.0.0", Revision: k.Revision(), Anchored: k.CurrentID(), Announced: k.CurrentID(),
		Encrypted: k.CurrentID(), Problem: "none", Started: time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"revision": k.Revision(), "anchored": k.CurrentID(), "announced": k.CurrentID(), "encrypted": k.CurrentID(), "acknowledged": seal.KeyID(""),
		"bootStates": 0, "started": "2026-05-04T03:02:01Z", "version": "2.0.0", "problem": "none", "ek": ek,
	}
	if got := summarizeRecord(record, k.Marshal()); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	delete(want, "ek")
	if got := summarizeRecord(record, nil); !maps.Equal(got, want) {
		t.Errorf("without a keyring: got %v, want %v", got, want)
	}
}
