package node

import (
	"bytes"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal"
)

// HardenProcess keeps the process out of core files and away from other users'
// debuggers. Call it before anything secret exists.
func HardenProcess() {
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	_ = unix.Mlockall(lockAll) // lockProcess checks the result where it matters
}

// lockAll locks each page when it is first used.
const lockAll = unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT

// lockProcess keeps the whole process out of swap. KEKs have separate locked memory.
// This lock is for values on Go's heap that derive from KEKs, for instance AES key
// schedules. It locks only used pages, so it costs nothing else.
func lockProcess(mem seal.Memory, log *slog.Logger) error {
	err := unix.Mlockall(lockAll)
	if err == nil {
		return nil
	}
	if mem.BestEffort || !swapOn() {
		log.Warn("the process's memory is not locked, only that of the KEKs; raise LimitMEMLOCK= of the unit", "error", err, "swap", swapOn())
		return nil
	}
	return seal.Errorf(seal.CauseMemory, "raise LimitMEMLOCK= of the unit, switch swap off, or accept it with memory.lock: best-effort",
		"lock the process's memory while swap is on: %w", err)
}

// swapOn reports whether anything could be swapped out. In doubt it returns true.
func swapOn() bool {
	b, err := os.ReadFile("/proc/swaps")
	return err != nil || bytes.Count(b, []byte("\n")) > 1
}
