package verifierd

import (
	"crypto/tls"
	"net"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/grpcserver/verifier"
)

// Report holds the facts that nodes must know about a verifier, and the nodes that the
// verifier knows.
type Report struct {
	Config      string `json:"config"`
	ClusterID   string `json:"clusterID"`
	Listen      string `json:"listen"`
	Certificate string `json:"certificate"` // digest
	PublicKey   string `json:"publicKey"`   // PEM
	Nodes       []Node `json:"nodes"`
	// NodeConfiguration is the part of a node's configuration for this verifier.
	NodeConfiguration string `json:"nodeConfiguration"`
}

// PublicKeyPath is the path at which nodes should keep the verifier's public key.
const PublicKeyPath = "/etc/kleidi/verifier.pub"

// Describe reads certificate and key; address is what nodes dial, "" if unknown.
func (c *Config) Describe(address string) (*Report, error) {
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
	r := &Report{Config: c.path, ClusterID: c.ClusterID.String(), Listen: c.Listen, PublicKey: string(public), Nodes: c.Nodes,
		Certificate: verifier.Digest(certificate.Certificate[0])}
	if r.Nodes == nil {
		r.Nodes = []Node{}
	}
	if address == "" {
		address = addressOf(certificate, c.Listen)
	}
	settings, err := yaml.Marshal(map[string]any{"tpm": map[string]any{"verifier": map[string]any{
		"address": address, "certificate": r.Certificate, "publicKey": PublicKeyPath}}})
	r.NodeConfiguration = string(settings)
	return r, err
}

// addressOf guesses the address that nodes dial: the certificate's first name, and the
// port.
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
