// Package device opens a TPM 2.0, sends it commands and closes it. A [Device] is open
// only during an operation, or a few operations in a row.
//
// A TPM that hangs, goes away or answers garbage is an error of the operation, and
// affects nothing else in the process.
package device
