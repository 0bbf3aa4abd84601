//go:build goexperiment.runtimesecret

package seal

import "runtime/secret"

// Erase runs f, then erases everything that f leaves in registers, on the stack and on
// the heap.
func Erase(f func()) { secret.Do(f) }
