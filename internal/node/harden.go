package node

import (
	"bytes"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal"
)

// HardenProcess keeps the process out of core files and away from other users'
// debuggers. It comes before anything secret exists.
func HardenProcess() {
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	_ = unix.Mlockall(lockAll) // lockProcess says whether that went well, where it matters
}

// lockAll locks the pages that are used, when they are.
const lockAll = unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT

// lockProcess keeps the whole process out of swap. KEKs have locked memory of
// their own; this is for what derives from them on Go's heap, AES key schedules
// for instance. Only pages that are used are locked, so it costs nothing else.
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

// swapOn reports whether anything could be swapped out, and errs on that side.
func swapOn() bool {
	b, err := os.ReadFile("/proc/swaps")
	return err != nil || bytes.Count(b, []byte("\n")) > 1
}
