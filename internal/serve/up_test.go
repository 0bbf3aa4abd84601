package serve

import (
	"testing"
	"testing/synctest"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
)

// TestUpAfterTheAdminSocket: serve answers nobody over HTTP before a command can find the
// admin socket.
func TestUpAfterTheAdminSocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{Node: &node.Node{Config: &config.Config{}}, adminTried: make(chan struct{})}
		s.Node.Config.HTTP.Address = "no address"
		ended := make(chan error, 1)
		go func() { ended <- s.serveHTTPAddress() }()
		synctest.Wait()
		select {
		case err := <-ended:
			t.Fatalf("it did not wait: %v", err)
		default:
		}
		close(s.adminTried)
		if err := <-ended; err == nil {
			t.Error("it listens on no address")
		}
	})
}
