package seal

import "runtime"

// Collect runs the garbage collector. What [Erase] left on the heap is erased
// only when it is collected, which an idle process does every two minutes. It
// takes about a millisecond, so it is for the end of a rare operation on a KEK.
func Collect() { runtime.GC() }
