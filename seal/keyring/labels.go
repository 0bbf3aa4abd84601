package keyring

// Labels separate the uses of one KEK. They are part of the frozen format: a
// changed meaning needs a new label.
const (
	labelKeyID   = "kleidi key id v1"
	labelDEKSeed = "kleidi dek seed v1"
	labelRetired = "kleidi retired kek v1"
	labelMAC     = "kleidi keyring mac v1"

	// Of format 2 and of records.
	labelSection      = "kleidi own section mac v1"
	labelRecord       = "kleidi node record mac v1"
	labelAcknowledged = "kleidi acknowledgement v1"
	labelJoinDone     = "kleidi join done v1"
	labelArchive      = "kleidi archive mac v1"
)
