package slotview

import "github.com/beezy-dev/kleidi/tpm"

// Reader reads slots from the view of one node. It needs three facts of that node's
// configuration, and neither its TPM nor its disk.
type Reader struct {
	// Node is the node's name. Slots of other nodes do not concern it.
	Node string
	// Order is unlock.order: which wrappers may open the keyring, and in which order.
	Order []string
	// Counter is the node's epoch counter, which its TPM's slots must name.
	Counter tpm.Counter
}
