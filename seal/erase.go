//go:build !goexperiment.runtimesecret

package seal

// Erase runs f. Built without GOEXPERIMENT=runtimesecret, it erases nothing: whatever f
// leaves on the heap stays there until it is overwritten. The memory of the process is
// locked and left out of core files; see docs/threat-model.md.
func Erase(f func()) { f() }
