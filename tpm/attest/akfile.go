package attest

import (
	"os"

	"golang.org/x/sys/unix"
)

// AKFile is a file that keeps the attestation key, a [tpm.AKStore]. Nothing depends on
// it: a file that is missing or damaged costs the time that the TPM takes for a new key.
type AKFile string

// Load implements [tpm.AKStore].
func (f AKFile) Load() []byte {
	// O_NONBLOCK: opening a FIFO that somebody put there must not block.
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

// Save implements [tpm.AKStore]. It replaces the file in one step. It flushes nothing,
// and it says nothing of a failure: the disk may be read-only, and init is yet to make
// the folder when it attests the machine for the first time.
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
