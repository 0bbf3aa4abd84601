package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/grpcserver/verifier"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

func (a *app) newVerifier() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verifier",
		Short: "Verify nodes from another machine, and sign what their TPMs demand",
		Long: `Run the verifier of the remote gate, on a machine that is no node of the cluster. Where
a node's configuration names a verifier, the node's TPM unseals only with the
verifier's signature, and the verifier signs only after it has verified fresh
evidence of that TPM and its boot. docs/remote-attestation.md describes it.

Its configuration is of a kind of its own, see kleidi verifier init
(default ` + verifierPath + `). SIGHUP has it read the configuration, the keys and the
boot policies anew; SIGTERM ends it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.verifierConfig()
			if err != nil {
				return err
			}
			s, err := newVerifierService(c, logger(&config.Config{Log: c.Log}))
			if err != nil {
				return requireRoot(err)
			}
			return s.run(cmd.Context())
		},
	}
	cmd.AddCommand(a.newVerifierInit(), a.newVerifierRegister(), a.newVerifierShow())
	return cmd
}

// verifierStopTimeout bounds how long exchanges in progress may take.
const verifierStopTimeout = 5 * time.Second

// verifierService is a running verifier.
type verifierService struct {
	config *verifierConfig
	log    *slog.Logger
	server *verifier.Server
}

func newVerifierService(c *verifierConfig, log *slog.Logger) (*verifierService, error) {
	s := &verifierService{config: c, log: log}
	certificate, v, err := c.identity()
	if err != nil {
		return nil, err
	}
	audit := &auditFile{path: c.Audit.File}
	if err := audit.append(nil); err != nil {
		return nil, fmt.Errorf("audit.file: %w; without it every answer is no", err)
	}
	s.server, err = verifier.NewServer(verifier.Options{Verifier: v, Certificate: *certificate, Record: audit.record, Log: s.log})
	return s, err
}

// reload reads the configuration and all that it names anew. Where something is wrong
// with it, what was read before goes on to count.
func (s *verifierService) reload() {
	c, err := loadVerifierConfig(s.config.path)
	if err == nil {
		err = s.replace(c)
	}
	if err != nil {
		s.log.Error("reload failed: the former configuration goes on to count", "error", err)
		return
	}
	s.log.Info("SIGHUP: the configuration was read anew", "nodes", len(c.Nodes))
}

func (s *verifierService) replace(c *verifierConfig) error {
	certificate, v, err := c.identity()
	if err != nil {
		return err
	}
	if c.Listen != s.config.Listen || c.Audit != s.config.Audit {
		return errors.New("listen and audit are read at start only; restart kleidi verifier")
	}
	s.server.Replace(v, *certificate)
	return nil
}

// watch reloads on each signal until ctx ends.
func (s *verifierService) watch(ctx context.Context, hup <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			s.reload()
		}
	}
}

// run returns when ctx has ended and every exchange has.
func (s *verifierService) run(ctx context.Context) error {
	l, err := net.Listen("tcp", s.config.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w; see that nothing else listens there", err)
	}
	s.log.Info("verifier listening", "version", version(), "address", l.Addr().String(), "cluster", s.config.ClusterID, "nodes", len(s.config.Nodes))
	if len(s.config.Nodes) == 0 {
		s.log.Warn("no node is registered, so every answer is no; see kleidi verifier register")
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	go s.watch(ctx, hup)
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
		grace, cancel := context.WithTimeout(context.Background(), verifierStopTimeout)
		defer cancel()
		s.server.GracefulStop(grace)
	})
	err = s.server.Serve(l)
	if !stop() {
		<-stopped
	}
	return err
}

// auditFile is where verdicts go, one JSON object a line. It is opened for each,
// so that it may be moved away at any time.
type auditFile struct {
	path string
	mu   sync.Mutex
}

func (f *auditFile) record(verdicts ...*verifier.Verdict) error {
	var lines []byte
	for _, v := range verdicts {
		line, err := json.Marshal(v)
		if err != nil {
			return err
		}
		lines = append(append(lines, line...), '\n')
	}
	return f.append(lines)
}

// append returns once the lines are on the disk. Where they do not fit they are taken back.
func (f *auditFile) append(lines []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	file, err := os.OpenFile(f.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if _, err := file.Write(lines); err != nil {
		return errors.Join(err, file.Truncate(info.Size()))
	}
	return errors.Join(file.Sync(), syncFolder(f.path))
}

func (a *app) newVerifierShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Check the verifier's configuration, and show what nodes have to know of it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.verifierConfig()
			if err != nil {
				return err
			}
			if _, err := c.verifier(); err != nil {
				return requireRoot(err)
			}
			r, err := c.describe("")
			if err != nil {
				return requireRoot(err)
			}
			return a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printVerifier(w, r) })
		},
	}
}

// verifierReport is what nodes have to know of a verifier, and whom it knows.
type verifierReport struct {
	Config      string         `json:"config"`
	ClusterID   string         `json:"clusterID"`
	Listen      string         `json:"listen"`
	Certificate string         `json:"certificate"` // digest
	PublicKey   string         `json:"publicKey"`   // PEM
	Nodes       []verifierNode `json:"nodes"`
	// NodeConfiguration is what goes into a node's configuration.
	NodeConfiguration string `json:"nodeConfiguration"`
}

// publicKeyPath is where nodes are told to keep the verifier's public key.
const publicKeyPath = "/etc/kleidi/verifier.pub"

// describe reads certificate and key; address is what nodes dial, "" if unknown.
func (c *verifierConfig) describe(address string) (*verifierReport, error) {
	certificate, err := c.tls()
	if err != nil {
		return nil, err
	}
	keys, err := c.keys()
	if err != nil {
		return nil, err
	}
	public, err := publicPEM(keys[0])
	if err != nil {
		return nil, err
	}
	r := &verifierReport{Config: c.path, ClusterID: c.ClusterID.String(), Listen: c.Listen, PublicKey: string(public), Nodes: c.Nodes,
		Certificate: verifier.Digest(certificate.Certificate[0])}
	if r.Nodes == nil {
		r.Nodes = []verifierNode{}
	}
	if address == "" {
		address = addressOf(certificate, c.Listen)
	}
	settings, err := yaml.Marshal(map[string]any{"tpm": map[string]any{"verifier": map[string]any{
		"address": address, "certificate": r.Certificate, "publicKey": publicKeyPath}}})
	r.NodeConfiguration = string(settings)
	return r, err
}

// addressOf guesses what nodes dial: the certificate's first name, and the port.
func addressOf(c *tls.Certificate, listen string) string {
	_, port, _ := net.SplitHostPort(listen)
	host := "VERIFIER"
	switch leaf := c.Leaf; {
	case leaf != nil && len(leaf.DNSNames) > 0:
		host = leaf.DNSNames[0]
	case leaf != nil && len(leaf.IPAddresses) > 0:
		host = leaf.IPAddresses[0].String()
	}
	return net.JoinHostPort(host, port)
}

func printVerifier(w io.Writer, r *verifierReport) {
	row(w, "configuration", r.Config)
	row(w, "cluster ID", r.ClusterID)
	row(w, "listens on", r.Listen)
	row(w, "certificate", r.Certificate)
	for _, n := range r.Nodes {
		row(w, "node", fmt.Sprintf("%s  EK %s  %s", n.Name, n.EK, n.BootPolicy))
	}
	fmt.Fprintf(w, "\non every node, write this to %s:\n\n%s\nand into its configuration:\n\n%s", publicKeyPath, r.PublicKey, r.NodeConfiguration)
}

// identity reads what a running verifier can replace.
func (c *verifierConfig) identity() (*tls.Certificate, *remote.Verifier, error) {
	certificate, err := c.tls()
	if err != nil {
		return nil, nil, err
	}
	v, err := c.verifier()
	return certificate, v, err
}

// verifier puts together who decides.
func (c *verifierConfig) verifier() (*remote.Verifier, error) {
	keys, err := c.keys()
	if err != nil {
		return nil, err
	}
	v := &remote.Verifier{Cluster: c.ClusterID, Keys: keys, Nodes: map[string]remote.Registration{}}
	if v.EKCertificate, err = c.endorsements(); err != nil {
		return nil, err
	}
	for i, n := range c.Nodes {
		p, err := readPolicy(n.BootPolicy)
		if err != nil {
			return nil, fmt.Errorf("nodes[%d].bootPolicy: %w", i, err)
		}
		v.Nodes[n.Name] = remote.Registration{EK: n.EK, BootPolicy: p}
	}
	return v, nil
}
