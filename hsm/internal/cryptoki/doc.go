// Package cryptoki calls PKCS#11 modules, which are C libraries: it loads a module, runs
// one call at a time on it, finds the token, logs in, and overwrites what a call leaves of
// keys and PINs. It records a token's answers to PINs, so that no PIN is given twice that
// the token refused. Without cgo the package has only names.
package cryptoki

// TokenMatch selects the token. Empty fields match every token.
type TokenMatch struct {
	Label, Serial, Manufacturer, Model string
	SlotID                             *uint
}
