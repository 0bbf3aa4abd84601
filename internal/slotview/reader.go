package slotview

import "github.com/beezy-dev/kleidi/tpm"

// Reader reads slots as one node does. It needs three facts of that node's
// configuration, and neither its TPM nor its disk.
type Reader struct {
	// Node is the node's name: slots of another one are none of its business.
	Node string
	// Order is unlock.order: which wrappers may open the keyring, and in which order.
	Order []string
	// Counter is the node's epoch counter, which its TPM's slots must name.
	Counter tpm.Counter
}
