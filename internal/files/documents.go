package files

import (
	"fmt"

	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

func ReadBootPolicy(path string) (*bootpolicy.BootPolicy, error) {
	b, err := Read(path, bootpolicy.MaxSize)
	if err != nil {
		return nil, err
	}
	p, err := bootpolicy.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("boot policy %s:\n%w", path, err)
	}
	return p, nil
}

func ReadBootStates(path string) (*bootstate.File, error) {
	b, err := Read(path, bootstate.MaxSize)
	if err != nil {
		return nil, err
	}
	return bootstate.Parse(b)
}
