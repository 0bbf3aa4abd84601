package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/internal/migrate"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

const (
	migrateWorkers = 8
	migrateRounds  = 3
)

// migrations compares kleidi migrate with a plain `get | replace` by the same number of
// workers, which is kube-apiserver's own write rate. Before each, kube-apiserver gets
// another key, so that every Secret is stale. They run in turns.
func (a *apiserver) migrations(ctx context.Context) error {
	kubeconfig := a.path("admin.conf")
	config := fmt.Sprintf("{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}], users: [{name: u, user: {token: %q}}], contexts: [{name: c, context: {cluster: c, user: u}}]}",
		a.url, a.path("certificates/apiserver.crt"), a.token)
	if err := os.WriteFile(kubeconfig, []byte(config), 0o600); err != nil {
		return err
	}
	ways := []struct {
		name string
		run  func(context.Context, string) (int, error)
	}{{"kleidi migrate", byKleidi}, {"get | replace", func(ctx context.Context, _ string) (int, error) { return a.replaceAll(ctx) }}}
	var took, cpu [2][]time.Duration
	objects := 0
	for range migrateRounds {
		for i, way := range ways {
			if err := a.nextKey(ctx); err != nil {
				return err
			}
			before, err := cpuTime(a.pid)
			if err != nil {
				return err
			}
			begin := time.Now()
			if objects, err = way.run(ctx, kubeconfig); err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			took[i] = append(took[i], time.Since(begin))
			after, err := cpuTime(a.pid)
			if err != nil {
				return err
			}
			cpu[i] = append(cpu[i], after-before)
		}
	}
	fmt.Printf("\nmigration of %d Secrets from one key of aescbc to another, %d workers, medians of %d in turns\n", objects, migrateWorkers, migrateRounds)
	for i, way := range ways {
		fmt.Printf("%-15s %6.0f objects/s, %4.0f µs of kube-apiserver's CPU for each\n", way.name, float64(objects)/median(took[i]).Seconds(), float64(median(cpu[i]).Microseconds())/float64(objects))
	}
	fmt.Printf("%-15s %6.2f (goal at least 0.9)\n", "ratio", median(took[1]).Seconds()/median(took[0]).Seconds())
	return nil
}

// nextKey restarts kube-apiserver with a new key before the former ones.
func (a *apiserver) nextKey(ctx context.Context) error {
	b, err := os.ReadFile(a.path("encryption.yaml"))
	if err != nil {
		return err
	}
	next := strings.Replace(aescbcProvider(), "name: bench", fmt.Sprintf("name: bench-%d", time.Now().UnixNano()), 1)
	b = []byte(strings.Replace(string(b), "providers: [", "providers: ["+next+", ", 1))
	if err := os.WriteFile(a.path("encryption.yaml"), b, 0o600); err != nil {
		return err
	}
	a.stop()
	return a.start(ctx)
}

func byKleidi(ctx context.Context, kubeconfig string) (int, error) {
	c, err := kube.NewClient(kube.Options{Kubeconfig: kubeconfig})
	if err != nil {
		return 0, err
	}
	r, err := migrate.Run(ctx, c, migrate.Options{Resources: []string{"secrets"}, By: migrate.ByPatch, Workers: migrateWorkers, Rate: 1e6})
	if err != nil {
		return 0, err
	}
	return r.Resources[0].Objects, nil
}

// replaceAll lists the Secrets, and writes each one back unchanged.
func (a *apiserver) replaceAll(ctx context.Context) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url+"/api/v1/secrets", nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	res, err := a.client.Do(req)
	if err != nil {
		return 0, err
	}
	b, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	if err != nil {
		return 0, err
	}
	var list struct{ Items []json.RawMessage }
	if err := json.Unmarshal(b, &list); err != nil {
		return 0, err
	}
	work := make(chan json.RawMessage)
	failed := make(chan error, migrateWorkers)
	var workers sync.WaitGroup
	for range migrateWorkers {
		workers.Go(func() {
			var first error
			for item := range work {
				if err := a.replace(ctx, item); first == nil {
					first = err
				}
			}
			failed <- first
		})
	}
	for _, item := range list.Items {
		work <- item
	}
	close(work)
	workers.Wait()
	for range migrateWorkers {
		if err := <-failed; err != nil {
			return 0, err
		}
	}
	return len(list.Items), nil
}

func (a *apiserver) replace(ctx context.Context, item json.RawMessage) error {
	var object struct {
		Metadata struct{ Namespace, Name string }
	}
	if err := json.Unmarshal(item, &object); err != nil {
		return err
	}
	return a.call(ctx, http.MethodPut, "/api/v1/namespaces/"+object.Metadata.Namespace+"/secrets/"+object.Metadata.Name, item)
}
