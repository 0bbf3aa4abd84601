package migration

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"k8s.io/kms/apis/v1beta1"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/internal/usage"
)

// objects is the number of Secrets; there are half as many ConfigMaps.
const objects = 30

// site is a control plane: kleidi, etcd, and two kube-apiservers, each with its own copy of
// the EncryptionConfiguration.
type site struct {
	*node.Node
	t      *testing.T
	binary string
	etcd   *cluster.Etcd
	apis   []*cluster.APIServer
	// file is the EncryptionConfiguration that the commands write; files are the copies of
	// the kube-apiservers.
	file  string
	files []string
	// reloads says that the second kube-apiserver uses a new copy without a restart.
	reloads bool
	// ahead is the kube-apiserver that gets the next step first.
	ahead   int
	written int
}

func start(t *testing.T) *site {
	t.Helper()
	binaries, err := cluster.Built("etcd", "kube-apiserver-1.37")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, Node: node.New(t), binary: binaries["kube-apiserver-1.37"]}
	s.etcd = cluster.StartEtcd(t, binaries["etcd"], s.Dir())
	s.ServeOpen()
	other := newBox(t)
	servePlugin(t, s.Path("v1.sock"), func(g *grpc.Server) { v1beta1.RegisterKeyManagementServiceServer(g, pluginV1{box: other}) })
	servePlugin(t, s.Path("v2.sock"), func(g *grpc.Server) { kmsapi.RegisterKeyManagementServiceServer(g, pluginV2{box: other}) })
	s.write(s.Path("accounts.pem"), cluster.ServiceAccountKey(t))
	s.file = s.Path("encryption.yaml")
	s.files = []string{s.Path("encryption-0.yaml"), s.Path("encryption-1.yaml")}
	return s
}

// servers starts the kube-apiservers, with a configuration or without any.
func (s *site) servers(configured bool) {
	s.t.Helper()
	for _, a := range s.apis {
		a.Stop()
	}
	s.apis = nil
	for i, file := range s.files {
		dir := s.Path(fmt.Sprint("apiserver-", i))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			s.t.Fatal(err)
		}
		setup := cluster.APIServerSetup{Binary: s.binary, Host: cluster.Loopback, Dir: dir, Etcds: []string{s.etcd.URL}, ServiceAccounts: s.Path("accounts.pem"),
			Args: []string{"--feature-gates", "KMSv1=true"}}
		if configured {
			s.copyTo(i)
			setup.EncryptionConfig, setup.Reload = file, i == 1 && s.reloads
		}
		s.apis = append(s.apis, cluster.NewAPIServer(s.t, setup))
	}
	for _, a := range s.apis {
		a.Launch(s.t)
	}
	for _, a := range s.apis {
		s.waitReady(a)
	}
}

// copyTo replaces the file of a kube-apiserver in one step.
func (s *site) copyTo(api int) {
	s.t.Helper()
	b, err := os.ReadFile(s.file)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(s.files[api]+".new", b)
	if err := os.Rename(s.files[api]+".new", s.files[api]); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) waitReady(a *cluster.APIServer) {
	s.t.Helper()
	a.WaitServing(s.t)
	node.Eventually(s.t, 5*time.Minute, "kube-apiserver is ready", a.Ready)
}

func (s *site) write(file string, b []byte) {
	s.t.Helper()
	if err := os.WriteFile(file, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// put writes an object through one of the kube-apiservers.
func (s *site) put(api int, kind, name string) {
	s.t.Helper()
	if err := cluster.Soon(func() error { return s.apis[api].Put(kind, name, map[string]string{"password": name}) }); err != nil {
		s.t.Fatal(kind, name, err)
	}
}

// name returns the name of the nth object.
func name(n int) string { return fmt.Sprint("o-", n) }

// store writes all objects again, in turn through each kube-apiserver.
func (s *site) store() {
	s.t.Helper()
	for n := range objects {
		s.put(n%len(s.apis), "secrets", name(n))
		if n%2 == 0 {
			s.put(n/2%len(s.apis), "configmaps", name(n))
		}
	}
}

// mustRead reads every object through every kube-apiserver, from etcd.
func (s *site) mustRead(when string) {
	s.t.Helper()
	for i, a := range s.apis {
		for n := range objects {
			var got map[string]string
			if err := cluster.Soon(func() (err error) { got, err = a.Secret(name(n)); return err }); err != nil || got["password"] != name(n) {
				s.t.Fatalf("%s: kube-apiserver %d reads Secret %d as %v, %v", when, i, n, got, err)
			}
			if n%2 == 0 {
				var text string
				path := "/api/v1/namespaces/" + cluster.Namespace + "/configmaps/" + name(n)
				if err := cluster.Soon(func() (err error) { text, err = a.Get(path); return err }); err != nil || !strings.Contains(text, `"password":"`+name(n)+`"`) {
					s.t.Fatalf("%s: kube-apiserver %d reads ConfigMap %d as %s, %v", when, i, n, text, err)
				}
			}
		}
	}
}

// kleidi runs a printed command line, with further flags.
func (s *site) kleidi(line string, flags ...string) (stdout string, code int) {
	s.t.Helper()
	args := strings.Fields(line)
	if args[0] != "kleidi" {
		s.t.Fatalf("%q is no command of kleidi", line)
	}
	cmd := s.Command(args[1], append(args[2:], flags...)...)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	if cmd.ProcessState.ExitCode() == 1 {
		s.t.Fatalf("%s: %s", line, &problems)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

var (
	hash = regexp.MustCompile(`sha256:[0-9a-f]{64}`)
	then = regexp.MustCompile(`(?m)^  then: (kleidi encryption-config .*)$`)
)

// step runs a printed command that writes a step, and gives the file to the kube-apiserver
// that is ahead. It returns the output.
func (s *site) step(line string) string {
	s.t.Helper()
	out, _ := s.kleidi(line)
	if !hash.MatchString(out) {
		s.t.Fatalf("%s: %s", line, out)
	}
	s.give(s.ahead, line)
	return out
}

// follow gives the file to the other kube-apiserver, so that both have the step.
func (s *site) follow() {
	s.t.Helper()
	s.give(1-s.ahead, "the other kube-apiserver follows")
}

// give gives the file to a kube-apiserver. Then each must read what the other writes.
func (s *site) give(api int, when string) {
	s.t.Helper()
	s.copyTo(api)
	a := s.apis[api]
	if api == 1 && s.reloads {
		s.waitReloaded(a)
	} else {
		a.Stop()
		a.Launch(s.t)
		s.waitReady(a)
	}
	s.mixed(when)
}

// waitReloaded returns once a kube-apiserver says that it uses the file.
func (s *site) waitReloaded(a *cluster.APIServer) {
	s.t.Helper()
	b, err := os.ReadFile(s.file)
	if err != nil {
		s.t.Fatal(err)
	}
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(b))
	node.Eventually(s.t, 5*time.Minute, "kube-apiserver has reloaded "+digest, func() error {
		metrics, err := a.Get("/metrics")
		if err != nil {
			return err
		}
		for l := range strings.Lines(metrics) {
			if strings.Contains(l, "encryption_config_controller_last_config_info") && strings.Contains(l, digest) {
				return nil
			}
		}
		return errors.New("it has another one")
	})
}

// mixed lets each kube-apiserver write, and each read everything.
func (s *site) mixed(when string) {
	s.t.Helper()
	for i := range s.apis {
		s.written++
		s.put(i, "secrets", name(s.written%objects))
	}
	s.mustRead("after " + when)
}

// prefixes are the beginnings of raw values, by the test's names for providers.
var prefixes = map[string]string{
	"kleidi": "k8s:enc:kms:v2:kleidi:", "aescbc": "k8s:enc:aescbc:v1:", "aesgcm": "k8s:enc:aesgcm:v1:", "secretbox": "k8s:enc:secretbox:v1:",
	"kms:trousseau": "k8s:enc:kms:v1:trousseau:", "kms:kleidi-1.x": "k8s:enc:kms:v2:kleidi-1.x:",
}

// raw counts the raw values of Secrets and ConfigMaps by their prefixes.
func (s *site) raw() map[string]int {
	s.t.Helper()
	all := map[string]int{}
	for _, kind := range []string{"secrets", "configmaps"} {
		values, err := s.etcd.Get("/registry/" + kind + "/")
		if err != nil {
			s.t.Fatal(err)
		}
		for key, value := range values {
			found := "identity"
			for name, prefix := range prefixes {
				if bytes.HasPrefix(value, []byte(prefix)) {
					found = name
				}
			}
			if found == "identity" && bytes.HasPrefix(value, []byte("k8s:enc:")) {
				s.t.Fatalf("%s begins %.40q", key, value)
			}
			all[found]++
		}
	}
	return all
}

// over migrates with the commands that the step printed, and compares their verdict with
// the raw values: first something is left, then nothing.
func (s *site) over(printed, to string) {
	s.t.Helper()
	migrate := regexp.MustCompile(`(?m)^  then: (kleidi migrate .*)$`).FindStringSubmatch(printed)
	usage := regexp.MustCompile(`(?m)exit code 0: (kleidi usage .*)$`).FindStringSubmatch(printed)
	if migrate == nil || usage == nil {
		s.t.Fatalf("no commands in %s", printed)
	}
	verdict := usage[1]
	before := s.raw()
	if out, code := s.kleidi(verdict, "--etcd", s.etcd.URL); code != 4 || len(before) < 2 {
		s.t.Fatalf("before the migration: exit code %d, %v: %s", code, before, out)
	}
	s.kleidi(migrate[1], "--kubeconfig", s.apis[0].Kubeconfig(s.t), "--by", "patch", "--rate", "2000")
	after := s.raw()
	if out, code := s.kleidi(verdict, "--etcd", s.etcd.URL); code != 0 || len(after) != 1 || after[to] == 0 {
		s.t.Fatalf("after the migration to %s: exit code %d, %v: %s", to, code, after, out)
	}
	s.mustRead("after the migration to " + to)
}

// command returns the command that shows the steps to a provider.
func (s *site) command(to string, flags ...string) string {
	command := strings.Join(append([]string{"kleidi encryption-config", "--from=" + s.file}, flags...), " ")
	if to != "kleidi" {
		command += " --to=" + to
	}
	return command
}

// begin takes step 1 from one provider to another, for the kube-apiserver that is ahead,
// and returns the output.
func (s *site) begin(from, to string, flags ...string) string {
	s.t.Helper()
	command := s.command(to, flags...)
	plan, _ := s.kleidi(command)
	next := regexp.MustCompile(`(?m)^next: (kleidi .* --step=1)$`).FindStringSubmatch(plan)
	if next == nil {
		s.t.Fatalf("%s: %s", command, plan)
	}
	one := s.step(next[1])
	if raw := s.raw(); !maps.Equal(raw, map[string]int{from: raw[from]}) {
		s.t.Fatalf("step 1 to %s writes: %v", to, raw)
	}
	return one
}

// move goes from one provider to another, and first turns back halfway. The two
// kube-apiservers are ahead of each other in turn, so that every two steps in a row meet.
func (s *site) move(from, to string, flags ...string) {
	s.t.Helper()
	begin := time.Now()
	s.ahead = 1 - s.ahead
	one := s.begin(from, to, flags...)
	s.ahead = 1 - s.ahead
	s.finish(one, from, to)
	s.t.Logf("%s to %s: %s", from, to, time.Since(begin).Round(time.Second))
}

// finish takes a move from step 1, which a kube-apiserver has, to its end, with a way back
// from the middle. The kube-apiserver that is ahead then has step 3, and the other one step
// 2, which is as good as the file before the next move.
func (s *site) finish(one, from, to string) {
	s.t.Helper()
	two := then.FindStringSubmatch(one)[1]
	s.step(two)
	if raw := s.raw(); raw[to] == 0 || raw[from] == 0 {
		s.t.Fatalf("in the middle: %v", raw)
	}
	// The other one still has step 1, which writes as the way back does.
	s.over(s.step(s.command(from)+" --step=2"), from)

	printed := s.step(two)
	s.follow()
	s.over(printed, to)
	s.step(then.FindStringSubmatch(printed)[1])
	if raw := s.raw(); !slices.Equal(slices.Collect(maps.Keys(raw)), []string{to}) {
		s.t.Fatalf("step 3 to %s: %v", to, raw)
	}
}

// TestFromNothing: a cluster without any EncryptionConfiguration comes to kleidi, and turns
// back halfway. One of its kube-apiservers reloads its file by itself.
func TestFromNothing(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.reloads = true
	s.servers(false)
	s.store()

	// kube-apiserver gets the first step when it is restarted.
	one, _ := s.kleidi("kleidi encryption-config --step=1 --resources=secrets,configmaps --file=" + s.file)
	s.servers(true)
	s.mixed("a restart with step 1")
	if raw := s.raw(); len(raw) != 1 || raw["identity"] == 0 {
		t.Fatalf("step 1 writes: %v", raw)
	}
	s.finish(one, "identity", "kleidi")
	s.follow()
	s.copies(4)
	t.Run("everything", s.everything)
}

// TestMoves goes from kleidi out to each other provider and back.
func TestMoves(t *testing.T) {
	t.Parallel()
	for _, others := range [][]string{{"aescbc", "aesgcm", "secretbox"}, {"kms:trousseau", "kms:kleidi-1.x", "identity"}} {
		t.Run(strings.NewReplacer("kms:", "", ".", "").Replace(strings.Join(others, ",")), func(t *testing.T) {
			t.Parallel()
			s := start(t)
			s.write(s.file, s.Run("encryption-config", "--resources", "secrets,configmaps"))
			s.servers(true)
			s.store()
			plugins := s.Path("plugins.yaml")
			s.write(plugins, fmt.Appendf(nil, `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
  - resources: [secrets]
    providers:
      - kms: {name: trousseau, endpoint: "unix://%s", cachesize: 10, timeout: 30s}
      - kms: {apiVersion: v2, name: kleidi-1.x, endpoint: "unix://%s", timeout: 30s}
`, s.Path("v1.sock"), s.Path("v2.sock")))
			for _, other := range others {
				s.move("kleidi", other, "--provider-from="+plugins)
				s.move(other, "kleidi")
			}
			s.undone()
			s.copies(6 * 4)
		})
	}
}

// undone: while no object is under the next provider, the copy of the former file undoes
// step 1.
func (s *site) undone() {
	s.t.Helper()
	one := s.begin("kleidi", "secretbox")
	former := regexp.MustCompile(`(?m)^the former file is kept as (\S+);`).FindStringSubmatch(one)
	if former == nil {
		s.t.Fatalf("no former file in %s", one)
	}
	if err := os.Rename(former[1], s.file); err != nil {
		s.t.Fatal(err)
	}
	s.give(s.ahead, "step 1 is undone")
	if b, err := os.ReadFile(s.file); err != nil || bytes.Contains(b, []byte("secretbox")) {
		s.t.Errorf("the former file is %s, %v", b, err)
	}
	if raw := s.raw(); !slices.Equal(slices.Collect(maps.Keys(raw)), []string{"kleidi"}) {
		s.t.Errorf("after step 1 is undone: %v", raw)
	}
}

// everything: with the wildcard for all resources nothing is left after a migration, and
// each resource has the API's name.
func (s *site) everything(t *testing.T) {
	s.apis[1].Stop()
	s.write(s.file, s.Run("encryption-config", "--resources", "*.*"))
	s.copyTo(0)
	s.apis[0].Stop()
	s.apis[0].Launch(t)
	s.waitReady(s.apis[0])
	s.kleidi("kleidi migrate --by=patch --rate=2000 --encryption-config="+s.file, "--kubeconfig", s.apis[0].Kubeconfig(t))
	out, code := s.kleidi("kleidi usage --all --encryption-config="+s.file, "--etcd", s.etcd.URL)
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, out)
	}
	var u usage.Usage
	s.JSON(&u, "usage", "--encryption-config", s.file, "--etcd", s.etcd.URL)
	groups := s.served()
	for _, r := range u.Stores[0].Resources {
		name, group, _ := strings.Cut(r.Name, ".")
		if served, ok := groups[name]; ok && served != group {
			t.Errorf("%s is of the group %q", r.Name, served)
		} else if !ok && !slices.Contains([]string{"ranges", "masterleases", "peerserverleases"}, name) {
			t.Errorf("%s is not served", r.Name)
		}
	}
	if len(u.Stores[0].Resources) < 15 {
		t.Errorf("only %d resources are stored", len(u.Stores[0].Resources))
	}
}

// served returns the groups of all resources that the API serves, except those that two
// groups serve.
func (s *site) served() map[string]string {
	s.t.Helper()
	var groups struct {
		Groups []struct {
			Name             string
			PreferredVersion struct{ GroupVersion string }
		}
	}
	if err := s.apis[0].Do(http.MethodGet, "/apis", nil, &groups); err != nil {
		s.t.Fatal(err)
	}
	all := map[string]string{}
	add := func(path, group string) {
		var list struct{ Resources []struct{ Name string } }
		if err := s.apis[0].Do(http.MethodGet, path, nil, &list); err != nil {
			s.t.Fatal(err)
		}
		for _, r := range list.Resources {
			if _, twice := all[r.Name]; !twice { // events are stored in the core group
				all[r.Name] = group
			}
		}
	}
	add("/api/v1", "")
	for _, g := range groups.Groups {
		add("/apis/"+g.PreferredVersion.GroupVersion, g.Name)
	}
	return all
}

// copies: every step keeps a copy of the former file that only root can read.
func (s *site) copies(least int) {
	s.t.Helper()
	kept, err := filepath.Glob(s.file + ".2*")
	if err != nil || len(kept) < least {
		s.t.Errorf("%d copies, %v", len(kept), err)
	}
	for _, file := range kept {
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
			s.t.Errorf("%s: %v, %v", file, info.Mode(), err)
		}
	}
}
