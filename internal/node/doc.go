// Package node is one machine, put together from its configuration: the TPM, the
// wrappers in the order of unlock.order, the gate, the stores of the keyring and of the
// anchor, and the unlocker that holds the open keyring.
//
// Node has methods about the machine alone. The operations on it are in packages of their
// own, such as reseal, slots and lifecycle. They read the slots of a keyring through
// Node.View, which is pure.
//
// The package keeps one rule for every operation: before a slot is sealed again, the
// configured wrapper must open the existing slot. A token or a server's key is found by
// its name, and an impostor can have the same name.
package node
