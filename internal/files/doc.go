// Package files reads and writes the small files that an operator hands to kleidi.
//
// Every read is bounded, because a path may name anything. A file with a secret is read
// into one buffer that the caller can clear. A written file is durable before the function
// returns, and a replaced one is at any moment either the old file or the new one.
package files
