package kube

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Watch implements replica.Store. It calls changed at each event, and each time that it
// has connected: a watch misses events while it is disconnected, and an open watch does
// not notice that etcd was restored.
func (s *Store) Watch(ctx context.Context, changed func()) {
	var group sync.WaitGroup
	for _, path := range []string{keyrings + "?fieldSelector=metadata.name%3D" + keyringName, nodes + "?"} {
		group.Go(func() { s.watch(ctx, path+"&watch=1&timeoutSeconds=600", changed) })
	}
	group.Wait()
}

func (s *Store) watch(ctx context.Context, path string, changed func()) {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = time.Second, 5*time.Second // the API may be the node's own, which starts after kleidi
	for ctx.Err() == nil {
		if s.follow(ctx, path, changed) {
			wait.Reset()
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait.NextBackOff()):
		}
	}
}

// metadataOnly asks for events without the objects, because only the existence of an
// event matters.
const metadataOnly = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

// follow calls changed for the events of one watch, and reports whether there was one.
func (s *Store) follow(ctx context.Context, path string, changed func()) bool {
	res, err := s.send(ctx, http.MethodGet, path, "", metadataOnly, nil)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return false
	}
	changed()
	for buf := make([]byte, 4096); ; {
		n, err := res.Body.Read(buf)
		if n > 0 {
			changed()
		}
		if err != nil {
			return true
		}
	}
}
