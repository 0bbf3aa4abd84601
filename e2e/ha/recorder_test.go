package ha

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// recorder records the key IDs that a node's KMS socket announces. A former key ID that
// comes back fails the test: kube-apiserver must never see a key ID flip back.
type recorder struct {
	of   *machine
	stop context.CancelFunc
	done sync.WaitGroup
	ids  []string
}

// record starts a recorder on each node. They end with the test.
func (c *controlPlane) record(t *testing.T) {
	t.Helper()
	for _, m := range c.Nodes {
		ctx, cancel := context.WithCancel(context.Background())
		r := &recorder{of: m, stop: cancel}
		conn, err := grpc.NewClient("unix://"+m.Path("run/kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
		must(t, err)
		r.done.Go(func() {
			defer conn.Close()
			r.run(ctx, kmsapi.NewKeyManagementServiceClient(conn))
		})
		t.Cleanup(func() { r.end(t) })
	}
}

func (r *recorder) run(ctx context.Context, client kmsapi.KeyManagementServiceClient) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		call, cancel := context.WithTimeout(ctx, time.Minute)
		status, err := client.Status(call, &kmsapi.StatusRequest{})
		cancel()
		// An error means that the node is down, or waits for the cluster store.
		if err == nil && (len(r.ids) == 0 || r.ids[len(r.ids)-1] != status.KeyId) {
			r.ids = append(r.ids, status.KeyId)
		}
	}
}

func (r *recorder) end(t *testing.T) {
	r.stop()
	r.done.Wait()
	t.Logf("%s has announced %d key IDs", r.of.Name, len(r.ids))
	for i, id := range r.ids {
		if slices.Contains(r.ids[:i], id) {
			t.Errorf("%s: key ID %s came again: %q", r.of.Name, id, r.ids)
		}
	}
	if len(r.ids) < 2 {
		t.Errorf("%s: no rotation was seen: %q", r.of.Name, r.ids)
	}
}

// load writes Secrets through each node, and reads each of them through all nodes, until
// it is ended.
type load struct {
	stop           chan struct{}
	done           sync.WaitGroup
	written, reads atomic.Int64
	mu             sync.Mutex
	failed         []error
	// outages counts, by node, how often its kleidi went down or came back: an odd number
	// means that it is down.
	outages map[string]int
}

func (c *controlPlane) load() *load {
	l := &load{stop: make(chan struct{}), outages: map[string]int{}}
	for _, m := range c.Nodes {
		l.done.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-l.stop:
					return
				default:
				}
				l.round(c, m, fmt.Sprintf("load-%s-%d", m.Name, i))
			}
		})
	}
	return l
}

func (l *load) round(c *controlPlane, m *machine, name string) {
	if err := l.call(m, func() error { return m.Put(name) }); err != nil {
		if !noLeader(err) { // the load was stopped during an election of etcd
			l.fail(fmt.Errorf("write Secret %s: %w", name, err))
		}
		return
	}
	l.written.Add(1)
	for _, reader := range c.Nodes {
		if err := l.call(reader, func() error { return reader.Holds(name) }); err != nil {
			if !noLeader(err) {
				l.fail(err)
			}
			continue
		}
		l.reads.Add(1)
	}
}

// kill kills a node's kleidi.
func (l *load) kill(m *machine) {
	l.mu.Lock()
	l.outages[m.Name]++
	l.mu.Unlock()
	m.Serving.Kill()
}

// back says that a killed kleidi serves again.
func (l *load) back(t *testing.T, m *machine) {
	t.Helper()
	node.Eventually(t, 2*time.Minute, m.Name+"'s kube-apiserver is ready", m.API.Ready)
	l.mu.Lock()
	l.outages[m.Name]++
	l.mu.Unlock()
}

// call makes a call through a node. Its error counts only if the node's kleidi was up the whole time:
// nothing saves a Decrypt during which kleidi is killed. Such a call is made again.
func (l *load) call(m *machine, call func() error) error {
	outages := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.outages[m.Name]
	}
	for {
		before := outages()
		err := call()
		if err == nil || before%2 == 0 && outages() == before && !noLeader(err) {
			return err
		}
		select {
		case <-l.stop:
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (l *load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = append(l.failed, err)
}

// end stops the load. None of its writes and reads may have failed.
func (l *load) end(t *testing.T) {
	t.Helper()
	close(l.stop)
	l.done.Wait()
	t.Logf("%d Secrets were written and %d read meanwhile, and %d calls failed", l.written.Load(), l.reads.Load(), len(l.failed))
	if len(l.failed) > 0 {
		t.Error(errors.Join(l.failed[:min(3, len(l.failed))]...))
	}
	if l.written.Load() == 0 {
		t.Error("no Secret was written meanwhile")
	}
}
