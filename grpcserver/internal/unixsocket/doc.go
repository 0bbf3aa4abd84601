// Package unixsocket listens on a unix socket that only the intended users can reach,
// and that no other user can replace.
//
// The package checks the folder before it makes anything in it. It binds the socket in
// a private folder beside its final place, sets mode and owner there, and then renames
// it: at its final path the socket never exists with other permissions. (The umask
// would do too, but it belongs to the whole process.) A lock file keeps two processes
// from taking the path at the same time. A socket that still answers is never replaced.
// At accept the package asks the kernel who connected (SO_PEERCRED).
package unixsocket
