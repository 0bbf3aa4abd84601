// Package node runs the kleidi binary on a machine whose TPM, a swtpm, booted as
// told. It is what the heavy tests share: each starts from an initialised node
// and uses the binary as an operator would, through its command line, its HTTP
// address and its socket.
package node
