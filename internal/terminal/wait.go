package terminal

import (
	"fmt"
	"io"
	"time"
)

// patience is how long a command is silent.
const patience = 3 * time.Second

// SayWaiting says once that a command still waits, until it is stopped: a TPM may take as
// long as tpm.timeout to answer, and looks dead meanwhile. awaited is what else the operation
// waits for.
func SayWaiting(w io.Writer, awaited string, limit fmt.Stringer) (stop func() bool) {
	text := "no answer yet from the TPM, a token or a server"
	if awaited != "" {
		text = "still waiting for " + awaited + ", or for the TPM"
	}
	return time.AfterFunc(patience, func() {
		fmt.Fprintf(w, "[wait] %s; the TPM is given up after tpm.timeout, %v\n", text, limit)
	}).Stop
}
