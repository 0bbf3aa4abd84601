package verifierd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/internal/files"
)

const (
	digestA = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	digestB = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"

	goodConfig = `apiVersion: kleidi.beezy.dev/v1alpha1
kind: VerifierConfiguration
clusterID: 000102030405060708090a0b0c0d0e0f
listen: 0.0.0.0:9781
certificate: /etc/tls.crt
key: /etc/tls.key
signingKey: /etc/signing.key
formerSigningKeys: [/etc/former.key]
audit: {file: /var/log/audit.log}
ekCertificates: {folder: /etc/ca}
# the nodes
nodes:
- {name: cp-1, ek: ` + digestA + `, bootPolicy: /etc/cp-1.yaml}
- {name: cp-2, ek: ` + digestB + `, bootPolicy: /etc/cp-2.yaml}
`
)

// TestParse: each unusable setting is a problem with its own path.
func TestParse(t *testing.T) {
	for name, row := range map[string]struct{ old, new, says string }{
		"good":                 {"", "", ""},
		"no former key":        {"[/etc/former.key]", "[]", ""},
		"no CA":                {"{folder: /etc/ca}", "{}", ""},
		"version":              {"v1alpha1", "v9", "apiVersion"},
		"kind":                 {"VerifierConfiguration", "KleidiConfiguration", "kind"},
		"no cluster":           {"000102030405060708090a0b0c0d0e0f", "00000000000000000000000000000000", "clusterID"},
		"bad cluster":          {"000102030405060708090a0b0c0d0e0f", "0001", "clusterID"},
		"no port":              {"0.0.0.0:9781", "0.0.0.0", "listen"},
		"port 0":               {"0.0.0.0:9781", "0.0.0.0:0", "listen"},
		"port 65536":           {"0.0.0.0:9781", "0.0.0.0:65536", "listen"},
		"named port":           {"0.0.0.0:9781", "0.0.0.0:https", "listen"},
		"relative certificate": {"/etc/tls.crt", "tls.crt", "certificate"},
		"relative key":         {"/etc/tls.key", "tls.key", "key"},
		"relative signing key": {"/etc/signing.key", "signing.key", "signingKey"},
		"relative former key":  {"/etc/former.key", "former.key", "formerSigningKeys[0]"},
		"relative audit":       {"/var/log/audit.log", "audit.log", "audit.file"},
		"no audit":             {"{file: /var/log/audit.log}", "{}", "audit.file"},
		"relative CA":          {"{folder: /etc/ca}", "{folder: ca}", "ekCertificates.folder"},
		"one key for both":     {"/etc/signing.key", "/etc/tls.key", "signingKey"},
		"former key for both":  {"/etc/former.key", "/etc/tls.key", "signingKey"},
		"unknown setting":      {"# the nodes", "policy: x", "policy"},
		"log":                  {"# the nodes", "log: {format: xml}", "log.format"},
		"relative HTTP socket": {"# the nodes", "http: {socket: http.sock}", "http.socket"},
		"no name":              {"name: cp-1", "name: ''", "nodes[0].name"},
		"a long name":          {"name: cp-1", "name: " + strings.Repeat("x", maxNodeName+1), "nodes[0].name"},
		"one name for two":     {"name: cp-2", "name: cp-1", "nodes[1].name"},
		"one TPM for two":      {digestB, digestA, "nodes[1].ek"},
		"no digest":            {digestA, "sha256:aa", "nodes[0].ek"},
		"another hash":         {digestA, strings.Replace(digestA, "sha256", "sha384", 1), "nodes[0].ek"},
		"upper case":           {digestA, "sha256:" + strings.ToUpper(digestA[7:]), "nodes[0].ek"},
		"not hexadecimal":      {digestA, strings.ReplaceAll(digestA, "aaaa", "zzzz"), "nodes[0].ek"},
		"relative boot policy": {"/etc/cp-2.yaml", "cp-2.yaml", "nodes[1].bootPolicy"},
		"more than is read":    {"# the nodes", "#" + strings.Repeat("x", maxConfig), "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parse([]byte(strings.Replace(goodConfig, row.old, row.new, 1)))
			if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
				t.Errorf("%v, want %q", err, row.says)
			}
		})
	}
}

// TestSetNode: a node is added once and replaced only on demand, and the rest of the
// document stays.
func TestSetNode(t *testing.T) {
	other := Node{Name: "cp-1", EK: "sha256:" + strings.Repeat("c", 64), BootPolicy: "/etc/new.yaml"}
	third := Node{Name: "cp-3", EK: other.EK, BootPolicy: "/etc/new.yaml"}
	for name, row := range map[string]struct {
		document string
		node     Node
		replace  bool
		says     string
		nodes    []string
	}{
		"third":            {goodConfig, third, false, "", []string{digestA, digestB, other.EK}},
		"again":            {goodConfig, other, false, "registered already", nil},
		"again, on demand": {goodConfig, other, true, "", []string{other.EK, digestB}},
		"first":            {goodConfig[:strings.Index(goodConfig, "nodes:\n")] + "nodes: []\n", third, false, "", []string{other.EK}},
		"no list":          {goodConfig[:strings.Index(goodConfig, "nodes:\n")], third, true, "", []string{other.EK}},
	} {
		t.Run(name, func(t *testing.T) {
			var doc yaml.Node
			if err := yaml.Unmarshal([]byte(row.document), &doc); err != nil {
				t.Fatal(err)
			}
			err := setNode(&doc, row.node, row.replace)
			if row.says != "" {
				if err == nil || !strings.Contains(err.Error(), row.says) {
					t.Error(err)
				}
				return
			}
			b, marshalErr := yaml.Marshal(&doc)
			if err != nil || marshalErr != nil {
				t.Fatal(err, marshalErr)
			}
			c, err := parse(b)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, n := range c.Nodes {
				got = append(got, n.EK)
			}
			if strings.Join(got, " ") != strings.Join(row.nodes, " ") {
				t.Errorf("%q, want %q", got, row.nodes)
			}
			if strings.Contains(row.document, "# the nodes") && !strings.Contains(string(b), "# the nodes") {
				t.Error("the comment is gone")
			}
		})
	}
}

func TestAddress(t *testing.T) {
	for want, leaf := range map[string]*x509.Certificate{
		"verifier.example:9781": {DNSNames: []string{"verifier.example", "other"}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}},
		"10.0.0.1:9781":         {IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}},
		"VERIFIER:9781":         nil,
	} {
		if got := addressOf(&tls.Certificate{Leaf: leaf}, "0.0.0.0:9781"); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestRemarks: after a failed reload the former nodes stay in force, and a remark says so
// until a reload succeeds.
func TestRemarks(t *testing.T) {
	h := newHealth(&auditFile{files.Log{Path: filepath.Join(t.TempDir(), "audit.log")}}, 0)
	says := func(failed float64, want ...string) {
		t.Helper()
		got := h.remarks()
		if len(got) != len(want) || h.reloadFailed() != failed {
			t.Fatalf("%q, %v; want %q", got, h.reloadFailed(), want)
		}
		for i := range want {
			if !strings.Contains(got[i], want[i]) {
				t.Errorf("%q does not say %q", got[i], want[i])
			}
		}
	}
	says(0, "no node is registered")
	h.reloaded(nil, errors.New("torn file"))
	says(1, "no node is registered", "the former configuration stays in force: torn file")
	h.reloaded(&Config{Nodes: make([]Node, 2)}, nil)
	says(0)
	h.reloaded(nil, errors.New("torn file"))
	says(1, "torn file")
	if err := h.ready(); err != nil {
		t.Errorf("with an audit log: %v", err)
	}
}

// TestSetup: the files of init are read by Load, and init overwrites none of them.
func TestSetup(t *testing.T) {
	s := Setup{Dir: filepath.Join(t.TempDir(), "verifier"), Cluster: "000102030405060708090a0b0c0d0e0f", Name: "verifier.example", Listen: "0.0.0.0:9781"}
	made, err := s.Make()
	if err != nil {
		t.Fatal(err)
	}
	c, err := Load(made.File())
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := c.tls()
	if err != nil || certificate.Leaf.VerifyHostname("verifier.example") != nil {
		t.Errorf("the certificate: %v", err)
	}
	if keys, err := c.keys(); err != nil || len(keys) != 1 {
		t.Errorf("%d signing keys: %v", len(keys), err)
	}
	for _, path := range []string{c.Key, c.SigningKey} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.tls(); err == nil {
		t.Error("a key of TLS that others may read is used")
	}
	if _, err := c.keys(); err == nil {
		t.Error("a signing key that others may read is used")
	}
	before, err := os.ReadFile(c.SigningKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Make(); err == nil || !strings.Contains(err.Error(), "exists; name another folder") {
		t.Errorf("init once more: %v", err)
	}
	if after, err := os.ReadFile(c.SigningKey); err != nil || string(after) != string(before) {
		t.Error("the signing key was overwritten")
	}
	for _, bad := range []Setup{{Dir: t.TempDir(), Cluster: "0001", Listen: s.Listen}, {Dir: t.TempDir(), Cluster: s.Cluster, Listen: "nowhere"}} {
		if _, err := bad.Make(); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
		if made, err := os.ReadDir(bad.Dir); err != nil || len(made) != 0 {
			t.Errorf("it leaves %v, %v", made, err)
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none.yaml")); err == nil || !strings.Contains(err.Error(), "make one with kleidi verifier init") {
		t.Error(err)
	}
}
