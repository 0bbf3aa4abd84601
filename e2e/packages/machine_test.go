package packages

import (
	"testing"

	"github.com/beezy-dev/kleidi/e2e/nspawn"
)

// boot boots a machine.
func boot(t *testing.T) *nspawn.Machine {
	t.Helper()
	m := nspawn.New(t, nspawn.Setup{
		Name: "cp-1", Archive: "systemd.tar",
		// With this capability nspawn's filter lets the unit lock memory, within the limit.
		Args: []string{"--capability=CAP_IPC_LOCK", "--system-call-filter=memfd_secret"},
	})
	m.Boot()
	return m
}
