// Package node runs the kleidi binary on a machine with a swtpm and a simulated boot.
// The heavy tests share it. Each test starts from an initialised node and uses the
// binary as an operator would, through its command line, its HTTP address and its
// socket.
package node
