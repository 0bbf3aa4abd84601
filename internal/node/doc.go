// Package node is one machine, put together from its configuration: the TPM, the wrappers
// in the order of unlock.order, the gate, the stores of the keyring and of the anchor, and
// the unlocker that holds the open keyring.
//
// Node has methods about the machine alone; what an operation does with it lives in
// packages reseal, slots, lifecycle and status. What the slots of a keyring say is read
// through Node.View, which is pure.
//
// One rule is kept here for every operation: before a slot is sealed again, the configured
// wrapper must open the existing one, since a token or a server's key is found by its
// name, and an impostor can have the same name.
package node
