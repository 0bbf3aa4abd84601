// Package operation is the table of all operations of the admin socket: the verb, the
// work behind it, and what the work expects of the keyring.
//
// The running serve registers the table. A command looks up its verb and sends the
// request to serve, or does the same work itself if no serve runs. A new operation is
// one line here and one function in the package of its noun.
package operation
