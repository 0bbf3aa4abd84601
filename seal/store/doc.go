// Package store keeps small documents: the keyring and the anchor. A crash at any
// moment leaves either the old document or the new one, whole. The package knows
// nothing about the content.
//
// A change is a compare-and-swap: [File.Save] takes the [Version] from which the
// change was made, and fails with [ErrConflict] if the file has another version by
// now. Save does not compare and swap atomically between processes. A process
// that saves must therefore hold the lock on the folder ([LockDir]).
package store
