// Package unixsocket listens on a unix socket that only those it is meant for
// can reach, and that nobody else can stand in for.
//
// The folder is checked before anything is made in it. The socket is bound in a
// private folder beside its place, gets its mode and owner there, and is then
// renamed: at its final path it never exists with other permissions. (The
// umask would do too, but it belongs to the whole process.) A lock file keeps two processes
// from taking the path at the same time, and a socket that still answers is
// never replaced. Who connected is asked of the kernel (SO_PEERCRED) at accept.
package unixsocket
