package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
)

// verifierSetup is what kleidi verifier init makes.
type verifierSetup struct {
	dir     string
	cluster string
	name    string
	listen  string
}

func (a *app) newVerifierInit() *cobra.Command {
	var s verifierSetup
	cmd := &cobra.Command{
		Use:   "init --cluster-id ID --name HOST",
		Short: "Make a verifier's certificate, signing key and configuration",
		Long: `Make a verifier's certificate, signing key and configuration, and print what goes into
the configuration of the nodes. Existing files stay as they are, and nothing is made
then. Keep a copy of the signing key where you keep the recovery identity: without it
no slot that demands its signature opens.`,
		Example: "  kleidi verifier init --cluster-id 5f0c… --name verifier.example.com",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := s.make()
			if err != nil {
				return requireRoot(fmt.Errorf("verifier init: %w", err))
			}
			_, port, _ := net.SplitHostPort(c.Listen)
			r, err := c.describe(net.JoinHostPort(s.name, port))
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), r, func(w io.Writer) {
				printVerifier(w, r)
				fmt.Fprintf(w, "\nthen register every node:\n\n  kleidi verifier register NAME --ek sha256:… --boot-policy FILE\n")
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&s.dir, "dir", filepath.Dir(verifierPath), "folder for all of it")
	flags.StringVar(&s.cluster, "cluster-id", "", "the cluster, as kleidi status on a node shows it")
	flags.StringVar(&s.name, "name", "", "name or IP address by which nodes reach the verifier")
	flags.StringVar(&s.listen, "listen", "0.0.0.0:9781", "address to listen on")
	_ = cmd.MarkFlagRequired("cluster-id")
	_ = cmd.MarkFlagRequired("name")
	return cmd
}

// verifierValidity is long, since nodes know the certificate by its digest.
const verifierValidity = 10 * 365 * 24 * time.Hour

func (s *verifierSetup) make() (*verifierConfig, error) {
	cluster, err := seal.ParseClusterID(s.cluster)
	if err != nil {
		return nil, fmt.Errorf("--cluster-id: %w; kleidi status on a node shows it", err)
	}
	if s.dir, err = filepath.Abs(s.dir); err != nil {
		return nil, err
	}
	in := func(name string) string { return filepath.Join(s.dir, name) }
	c := &verifierConfig{APIVersion: config.APIVersion, Kind: verifierKind, ClusterID: cluster, Listen: s.listen,
		Certificate: in("tls.crt"), Key: in("tls.key"), SigningKey: in("signing.key"), Audit: verifierAudit{in("audit.log")}, path: in("verifier.yaml")}
	document, err := yaml.Marshal(map[string]any{"apiVersion": c.APIVersion, "kind": c.Kind, "clusterID": s.cluster, "listen": c.Listen, "certificate": c.Certificate,
		"key": c.Key, "signingKey": c.SigningKey, "audit": map[string]any{"file": c.Audit.File}, "nodes": []any{}})
	if err != nil {
		return nil, err
	}
	if _, err := parseVerifierConfig(document); err != nil {
		return nil, fmt.Errorf("the configuration would not be valid:\n%w", err)
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	for _, path := range []string{c.Certificate, c.Key, c.SigningKey, c.path} {
		if _, err := os.Lstat(path); err == nil {
			return nil, fmt.Errorf("%s exists; name another folder with --dir, or move it away", path)
		}
	}
	if err := s.writeKeys(c); err != nil {
		return nil, err
	}
	return c, writeNew(c.path, document)
}

func (s *verifierSetup) writeKeys(c *verifierConfig) error {
	for _, path := range []string{c.Key, c.SigningKey} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		b, err := privatePEM(key)
		if err != nil {
			return err
		}
		err = writeNew(path, b)
		clear(b)
		if err != nil {
			return err
		}
		if path == c.SigningKey {
			continue
		}
		certificate, err := s.certificate(key)
		if err != nil {
			return err
		}
		if err := writeNew(c.Certificate, certificate); err != nil {
			return err
		}
	}
	return nil
}

// certificate returns a self-signed one, in PEM.
func (s *verifierSetup) certificate(key *ecdsa.PrivateKey) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: "kleidi verifier"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(verifierValidity),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true}
	if ip := net.ParseIP(s.name); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{s.name}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("certificate for %.80q: %w", s.name, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

func (a *app) newVerifierRegister() *cobra.Command {
	var n verifierNode
	var replace bool
	cmd := &cobra.Command{
		Use:   "register NAME --ek sha256:… --boot-policy FILE",
		Short: "Add a node to the verifier's configuration",
		Long: `Add a node to the verifier's configuration: its name, the digest of its TPM's
endorsement key, and the boot policy that its evidence is judged by. Bring digest and
boot policy from the node yourself, by a way that you trust: they say which TPM it is,
and how it may boot. Have the
verifier read it afterwards: systemctl reload kleidi-verifier, or SIGHUP.`,
		Example: "  kleidi verifier register cp-1 --ek sha256:4c1f… --boot-policy /etc/kleidi/verifier/cp-1.yaml",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			n.Name = args[0]
			c, err := a.verifierConfig()
			if err == nil {
				err = c.register(n, replace)
			}
			if err != nil {
				return requireRoot(fmt.Errorf("register: %w", err))
			}
			return a.show(cmd.OutOrStdout(), n, func(w io.Writer) {
				fmt.Fprintf(w, "node %s with EK %.23s… registered in %s; reload the verifier: systemctl reload kleidi-verifier\n", n.Name, n.EK, c.file())
			})
		},
	}
	cmd.Flags().StringVar(&n.EK, "ek", "", "digest of the endorsement key, as kleidi keyring show on the node prints it")
	cmd.Flags().StringVar(&n.BootPolicy, "boot-policy", "", "what kleidi bootpolicy record wrote on the node")
	cmd.Flags().BoolVar(&replace, "replace", false, "replace what is registered of that node")
	_ = cmd.MarkFlagRequired("ek")
	_ = cmd.MarkFlagRequired("boot-policy")
	return cmd
}

// register edits the file, and keeps its comments.
func (c *verifierConfig) register(n verifierNode, replace bool) error {
	var err error
	if n.BootPolicy, err = filepath.Abs(n.BootPolicy); err != nil {
		return err
	}
	if _, err := readPolicy(n.BootPolicy); err != nil {
		return err
	}
	b, err := readFile(c.path, maxVerifierConfig)
	if err != nil {
		return err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return err
	}
	if err := enter(&doc, n, replace); err != nil {
		return err
	}
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := errors.Join(e.Encode(&doc), e.Close()); err != nil {
		return err
	}
	if _, err := parseVerifierConfig(out.Bytes()); err != nil {
		return fmt.Errorf("the configuration would not be valid:\n%w", err)
	}
	return replaceFile(c.path, out.Bytes())
}

// enter puts a node into the sequence at nodes, of a document that was parsed.
func enter(doc *yaml.Node, n verifierNode, replace bool) error {
	var entry yaml.Node
	if err := entry.Encode(n); err != nil {
		return err
	}
	top := doc.Content[0]
	for i := 0; i+1 < len(top.Content); i += 2 {
		if top.Content[i].Value != "nodes" {
			continue
		}
		list := top.Content[i+1]
		list.Style = 0
		for k, old := range list.Content {
			var known verifierNode
			if old.Decode(&known) != nil || known.Name != n.Name {
				continue
			}
			if !replace {
				return fmt.Errorf("node %q is registered already; add --replace to replace it", n.Name)
			}
			list.Content[k] = &entry
			return nil
		}
		list.Content = append(list.Content, &entry)
		return nil
	}
	top.Content = append(top.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: "nodes"}, &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{&entry}})
	return nil
}

// replaceFile replaces a file in one step.
func replaceFile(path string, b []byte) error {
	next := path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := writeNew(next, b); err != nil {
		return err
	}
	return errors.Join(os.Rename(next, path), syncFolder(path))
}
