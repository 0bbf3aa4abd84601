package hsm

import "context"

// PIN is what a token reports about its user PIN. PKCS#11 has no number of tries: a token
// says only whether a wrong PIN was given, and whether one try or none is left.
type PIN struct {
	Module, TokenLabel string
	// CountLow says that a wrong PIN was given since the last right one.
	Locked, FinalTry, CountLow bool
}

// PIN reads the token's flags. It gives the token no PIN, and opens no session.
func (w *Wrapper) PIN(ctx context.Context) (PIN, error) {
	p, err := w.readPIN(ctx)
	if err != nil {
		return PIN{}, w.withName("read the flags of the token", err)
	}
	return p, nil
}
