// Package store keeps small documents, the keyring and the anchor, so that a crash
// at any moment leaves either the old or the new one, whole. It knows nothing of
// what the bytes mean.
//
// A change is a compare-and-swap: [File.Save] takes the [Version] that the
// change was made from and fails with [ErrConflict] if the file is another by
// now. Between processes the comparison is only as good as the lock on the
// folder ([LockDir]), which whoever saves holds.
package store
