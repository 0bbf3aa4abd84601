package seal

import "runtime"

// Collect runs the garbage collector. [Erase] erases heap memory only when that
// memory is collected, which in an idle process happens every two minutes.
// Collect takes about a millisecond: call it at the end of a rare operation on a
// KEK.
func Collect() { runtime.GC() }
