// Package operation is the table of everything that the admin socket can be asked for: the
// verb, the work behind it, and what the work expects of the keyring.
//
// The running serve registers the table; a command looks its verb up, sends the request to
// serve, and does the same work itself where no serve runs. A new operation is one line here
// and one function in the package of its noun.
package operation
