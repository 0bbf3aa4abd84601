package eventlog

// Difference is one change between two boots, for display. It explains a refusal and
// decides nothing.
type Difference struct {
	PCR int `json:"pcr"`
	// Event names the measured thing: "kernel command line".
	Event string `json:"event"`
	// Was and Now are its values when the slot was made and now; "" if it was not
	// measured in that boot.
	Was string `json:"was,omitempty"`
	Now string `json:"now,omitempty"`
	// Cause is the usual reason for such a change, or "".
	Cause string `json:"cause,omitempty"`
}

// circumstances are facts about a change that the events of other PCRs show.
type circumstances struct {
	uki        bool // a unified kernel image was or is booted
	secureBoot bool // Secure Boot was switched on or off
	restart    Restart
}

// change is an event that was replaced, removed (now is nil) or added (was is nil).
type change struct{ was, now *Summary }

// short abbreviates a digest or PCR value.
func short(digest string) string {
	if len(digest) > 12 {
		digest = digest[:12] + "…"
	}
	return printable(digest, 13)
}
