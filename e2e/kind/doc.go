// Package kind runs the pod of deploy/kind without a container engine: its script, in a
// root folder, with namespaces and the capabilities of the pod. It needs root.
package kind
