package monitor

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/grpcserver/internal/unixsocket"
)

// otherFiles is the room for descriptors that are not connections to this process:
// keyring, event logs, the TPM, locked memory, a PKCS#11 module's own, connections to a
// server.
const otherFiles = 128

// files is the number of file descriptors in use if the KMS and admin sockets and both
// listeners of health and metrics hold as many connections as they admit.
const files = 2*(unixsocket.MaxConns+unixsocket.MaxStrangers) + 2*(MaxConns+1) + otherFiles

// CheckFiles verifies that the process may open as many files as connections are admitted by
// these sockets and by further listeners, which admit others. Joins that have proven their
// TPM are not counted.
func CheckFiles(others uint64) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("getrlimit: %w", err)
	}
	if want := files + others; limit.Cur < want {
		return fmt.Errorf("the process may open %d files, and its sockets admit connections for %d; raise LimitNOFILE= of the unit", limit.Cur, want)
	}
	return nil
}
