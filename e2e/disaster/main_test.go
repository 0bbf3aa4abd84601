package disaster

import (
	"os"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/threenodes"
)

func TestMain(m *testing.M) { os.Exit(threenodes.Main(m, func() error { return nil }, "etcdutl")) }
