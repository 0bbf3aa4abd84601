//go:build goexperiment.runtimesecret

package seal

import "runtime/secret"

// Erase runs f and erases what it leaves in registers, on the stack and in the heap.
func Erase(f func()) { secret.Do(f) }
