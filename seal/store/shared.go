package store

// NodeRecord is the record of one node, as a cluster store holds it. An attacker who
// can write to the store may have chosen everything in it.
type NodeRecord struct {
	Node  string
	Bytes []byte
	// AfterKeyring says that the record was written after the keyring that the store
	// holds now. A record from before it can have been planted by a node that this
	// keyring removed.
	AfterKeyring bool
}
