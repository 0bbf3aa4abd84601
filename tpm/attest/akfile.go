package attest

import (
	"os"

	"golang.org/x/sys/unix"
)

// AKFile is a file that keeps the attestation key, a [keys.AKStore]. Nothing depends on
// the file: if it is missing or damaged, the TPM only spends the time for a new key.
type AKFile string

// Load implements [keys.AKStore].
func (f AKFile) Load() []byte {
	// O_NONBLOCK: opening must not block if somebody put a FIFO there.
	file, err := os.OpenFile(string(f), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer file.Close()
	b, err := readAll(file)
	if err != nil {
		return nil
	}
	return b
}

// Save implements [keys.AKStore]. It replaces the file in one step, without a flush, and
// ignores a failure: the disk may be read-only, and init attests the machine for the
// first time before it makes the folder.
func (f AKFile) Save(b []byte) {
	tmp := string(f) + ".tmp"
	err := os.WriteFile(tmp, b, 0o600)
	if err == nil {
		err = os.Rename(tmp, string(f))
	}
	if err != nil {
		_ = os.Remove(tmp)
	}
}
