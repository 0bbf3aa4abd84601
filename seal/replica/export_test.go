package replica

import "time"

// SetClockBack sets the wall clock back by d since the start of r, as far as r can notice.
func SetClockBack(r *Replica, d time.Duration) { r.started = r.started.Add(d) }

// Monotonic reports whether r knows its start by the monotonic clock, which nobody sets.
func Monotonic(r *Replica) bool { return r.began != r.began.Round(0) }
