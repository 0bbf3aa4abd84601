package packages

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/nspawn"
)

// apiserver calls kleidi as kube-apiserver does: through the folder of the socket, which
// it mounted when it started, and with a time limit for each call. A call waits until the
// socket answers.
type apiserver struct {
	t      *testing.T
	folder *os.File
	kms    kmsapi.KeyManagementServiceClient
	sealed *kmsapi.EncryptResponse
	seed   []byte
}

func newAPIServer(t *testing.T, m *nspawn.Machine) *apiserver {
	t.Helper()
	// An open folder behaves like a mounted one: it stays while its files come and go.
	folder, err := os.Open(m.Live("/run/kleidi"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { folder.Close() })
	conn, err := grpc.NewClient(fmt.Sprintf("unix:///proc/self/fd/%d/kms.sock", folder.Fd()),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: 20 * time.Second}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	a := &apiserver{t: t, folder: folder, kms: kmsapi.NewKeyManagementServiceClient(conn), seed: bytes.Repeat([]byte("seed"), 8)}
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	if a.sealed, err = a.kms.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: a.seed, Uid: "first"}); err != nil {
		t.Fatal(err)
	}
	return a
}

// callTimeout is far above the timeout in the EncryptionConfiguration, so that a call does not
// fail because this machine is busy.
const callTimeout = 2 * time.Minute

// call has the first seed decrypted.
func (a *apiserver) call() error {
	ctx, cancel := context.WithTimeout(a.t.Context(), callTimeout)
	defer cancel()
	r, err := a.kms.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: a.sealed.Ciphertext, KeyId: a.sealed.KeyId, Annotations: a.sealed.Annotations, Uid: "again"})
	if err == nil && !bytes.Equal(r.Plaintext, a.seed) {
		err = fmt.Errorf("another seed comes back")
	}
	return err
}

// during makes calls without a pause while f runs, and one more afterwards. No call may
// fail.
func (a *apiserver) during(what string, f func()) {
	a.t.Helper()
	stop := make(chan struct{})
	var calls int
	var slowest time.Duration
	var failed error
	var wg sync.WaitGroup
	wg.Go(func() {
		for failed == nil {
			start := time.Now()
			failed = a.call()
			calls++
			slowest = max(slowest, time.Since(start))
			select {
			case <-stop:
				if failed == nil {
					failed = a.call()
				}
				return
			default:
			}
		}
	})
	f()
	close(stop)
	wg.Wait()
	a.t.Logf("%s: %d calls, the slowest took %v", what, calls, slowest.Round(time.Millisecond))
	if failed != nil {
		a.t.Errorf("%s: a call of kube-apiserver fails: %v", what, failed)
	}
}
