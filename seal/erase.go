//go:build !goexperiment.runtimesecret

package seal

// Erase runs f. Without GOEXPERIMENT=runtimesecret what f leaves behind on the
// heap stays until it is overwritten; the process's memory is locked and left
// out of core files, see docs/threat-model.md.
func Erase(f func()) { f() }
