package terminal

import (
	"fmt"
	"io"
	"os"
	"time"
)

// progressEvery bounds how often a terminal is written to.
const progressEvery = 200 * time.Millisecond

// Progress returns a function that shows at a terminal how much of a total is done, or how
// much of what if the total is 0. Elsewhere it returns nil. done wipes the line.
func Progress(w io.Writer, what string) (progress func(n, total int64), done func()) {
	f, ok := w.(*os.File)
	if !ok || !Is(f) {
		return nil, func() {}
	}
	var last time.Time
	progress = func(n, total int64) {
		if time.Since(last) < progressEvery {
			return
		}
		last = time.Now()
		if total > 0 {
			fmt.Fprintf(w, "\r\x1b[K%d %%", 100*n/total)
			return
		}
		fmt.Fprintf(w, "\r\x1b[K%d %s", n, what)
	}
	return progress, func() { fmt.Fprint(w, "\r\x1b[K") }
}
