package ha

import (
	"errors"
	"os"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/threenodes"
)

func TestMain(m *testing.M) {
	os.Exit(threenodes.Main(m, func() error {
		_, err := buildOlder(beforeStore)
		_, errSeveral := buildOlder(beforeSeveral)
		return errors.Join(err, errSeveral)
	}))
}
