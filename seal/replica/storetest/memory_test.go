package storetest_test

import (
	"testing"

	"github.com/beezy-dev/kleidi/seal/replica/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Test(t, func(*testing.T) storetest.Harness { return new(storetest.Memory) })
}
