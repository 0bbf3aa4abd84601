// Package cluster holds what kleidi needs in the cluster's API, as YAML.
package cluster

import (
	_ "embed" // the files
	"strings"
)

// CRDs are the definitions of the resources.
//
//go:embed crds.yaml
var CRDs string

//go:embed node.yaml
var node string

// Node returns what one node needs: its role, the binding, and an empty KeyringNode.
func Node(name string) string { return strings.ReplaceAll(node, "NODE", name) }

// User returns the user name in the client certificate of a node.
func User(name string) string { return "kleidi:node:" + name }

// RequestName returns the name of the CertificateSigningRequest of a node. Its role names
// it.
func RequestName(name string) string { return "kleidi-node-" + name }

// BindingName returns the name of the ClusterRoleBinding of a node.
func BindingName(name string) string { return "kleidi-node-" + name }
