package admin

import "github.com/beezy-dev/kleidi/seal"

// Problem is an error in parts.
type Problem struct {
	Cause   seal.Cause `json:"cause,omitempty"`
	Message string     `json:"message"`
	// Details list what the message announces, for instance each PCR that differs.
	Details []string `json:"details,omitempty"`
	Hint    string   `json:"hint,omitempty"`
}
