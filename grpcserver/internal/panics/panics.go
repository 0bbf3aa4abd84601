// Package panics reports a recovered panic without its value. The value of a panic may
// hold anything, even a key; its type and the place of the panic do not.
package panics

import (
	"fmt"
	"log/slog"
	"runtime"
)

// maxFrames bounds the frames of one report.
const maxFrames = 32

// Log writes the type of value and the functions on the stack, never the value
// and never an argument. Call it from the deferred function that recovered.
func Log(log *slog.Logger, where string, value any) {
	log.Error("panic recovered", "in", where, "type", fmt.Sprintf("%T", value), "stack", stack())
}

func stack() []string {
	pcs := make([]uintptr, maxFrames)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(4, pcs)]) // from the recovering function on
	var out []string
	for {
		f, more := frames.Next()
		out = append(out, fmt.Sprintf("%s:%d", f.Function, f.Line))
		if !more {
			return out
		}
	}
}
