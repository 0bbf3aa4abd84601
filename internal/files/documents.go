package files

import (
	"fmt"

	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

// ReadBootPolicy reads a boot policy that will decide, and refuses a file that others
// may write.
func ReadBootPolicy(path string) (*bootpolicy.BootPolicy, error) {
	return parseBootPolicy(ReadOwned, path)
}

// ReadAnyBootPolicy reads a boot policy for display, no matter who wrote it.
func ReadAnyBootPolicy(path string) (*bootpolicy.BootPolicy, error) {
	return parseBootPolicy(Read, path)
}

func parseBootPolicy(read func(string, int64) ([]byte, error), path string) (*bootpolicy.BootPolicy, error) {
	b, err := read(path, bootpolicy.MaxSize)
	if err != nil {
		return nil, err
	}
	p, err := bootpolicy.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("boot policy %s:\n%w", path, err)
	}
	return p, nil
}

// ReadBootStates reads signed boot states that will decide, and refuses a file that
// others may write.
func ReadBootStates(path string) (*bootstate.File, error) {
	return parseBootStates(ReadOwned, path)
}

// ReadAnyBootStates reads signed boot states for display, no matter who wrote them.
func ReadAnyBootStates(path string) (*bootstate.File, error) {
	return parseBootStates(Read, path)
}

func parseBootStates(read func(string, int64) ([]byte, error), path string) (*bootstate.File, error) {
	b, err := read(path, bootstate.MaxSize)
	if err != nil {
		return nil, err
	}
	return bootstate.Parse(b)
}
