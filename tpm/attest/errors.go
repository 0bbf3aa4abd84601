package attest

// userspaceError is a fault of systemd's log.
type userspaceError struct{ err error }

// quoteError is a fault of a quote.
type quoteError struct{ err error }

// disagreement is go-attestation's objection to logs that our own parser accepts.
type disagreement struct{ error }

func (u *userspaceError) Error() string { return "userspace event log: " + u.err.Error() }

func (u *userspaceError) Unwrap() error { return u.err }

func (q *quoteError) Error() string { return "quote: " + q.err.Error() }

func (q *quoteError) Unwrap() error { return q.err }

func (d *disagreement) Unwrap() error { return d.error }
