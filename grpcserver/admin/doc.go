// Package admin connects the CLI to the running serve: JSON over HTTP on a unix socket
// that only root may use.
//
// Each verb is a typed constant ([Rotate], [Recover], …), which ties its name to its
// request and its response. [Handle] and [Call] take the same constant, so that client
// and server can't disagree. Errors cross the socket as [seal.Error], with cause and
// hint.
//
// If no serve runs, [Dial] returns [ErrNotRunning], and the CLI takes the lock on the
// state folder instead.
package admin
