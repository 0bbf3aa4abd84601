// Package migrate has kube-apiserver write stored objects again, so that they come under
// the current key. It changes none of them: where the cluster serves
// StorageVersionMigration, kube-controller-manager does the work; elsewhere each object
// gets an empty patch. kube-apiserver writes an unchanged object only if it is stored
// under another key, so that a migration that was interrupted goes on where it was when
// it is run again.
package migrate

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// The ways to migrate.
const (
	// ByAPI leaves the work to StorageVersionMigration.
	ByAPI = "api"
	// ByPatch patches each object.
	ByPatch = "patch"
)

// Options say what to migrate, and how.
type Options struct {
	// Resources are as in an EncryptionConfiguration: secrets, or *.stable.example.com.
	Resources []string
	// By is ByAPI or ByPatch. If empty, the API is used where it is served.
	By string
	// Workers patch side by side, all of them together at most Rate objects per second.
	Workers int
	Rate    float64
	// DryRun counts, and changes nothing.
	DryRun bool
	// Progress is told after each object.
	Progress func(resource string, done int)
}

// Result says what was done.
type Result struct {
	DryRun    bool       `json:"dryRun,omitempty"`
	By        string     `json:"by"`
	Resources []Migrated `json:"resources"`
	// ClusterRole is what the user in the kubeconfig needs, as YAML.
	ClusterRole string `json:"clusterRole,omitempty"`
}

// Migrated is one resource.
type Migrated struct {
	Name string `json:"name"`
	// Objects is missing if the API does the work, which counts none.
	Objects int `json:"objects,omitempty"`
	// Conflicts counts the retries of objects that somebody else wrote meanwhile. Gone
	// counts those that were deleted.
	Conflicts int `json:"conflicts,omitempty"`
	Gone      int `json:"gone,omitempty"`
}

// Run migrates.
func Run(ctx context.Context, c *kube.Client, o Options) (*Result, error) {
	resources, err := discover(ctx, c, o.Resources)
	if err != nil {
		return nil, err
	}
	r := &Result{DryRun: o.DryRun, By: o.By, Resources: []Migrated{}}
	if r.By == "" {
		if r.By, err = choose(ctx, c); err != nil {
			return nil, err
		}
	}
	if o.DryRun {
		r.ClusterRole = ClusterRole(r.By, resources)
	}
	limit := rate.NewLimiter(rate.Limit(o.Rate), max(o.Workers, 1))
	for _, resource := range resources {
		m := Migrated{Name: resource.String()}
		switch {
		case r.By == ByAPI && o.DryRun:
		case r.By == ByAPI:
			err = byAPI(ctx, c, resource)
		default:
			p := &patcher{client: c, resource: resource, limit: limit, options: o}
			m, err = p.run(ctx)
		}
		r.Resources = append(r.Resources, m)
		if err != nil {
			return r, fmt.Errorf("migrate %s: %w", resource, refused(err))
		}
	}
	return r, nil
}

const hintAgain = "run kleidi migrate again: objects under the current key are not written again"

// refused adds the next step to an error of the API.
func refused(err error) error {
	if kube.Refused(err, http.StatusForbidden) {
		return &seal.Error{Err: err, Hint: "kleidi migrate --dry-run shows the ClusterRole that the user in the kubeconfig needs"}
	}
	var e *seal.Error
	if errors.As(err, &e) {
		return err
	}
	return &seal.Error{Err: err, Hint: hintAgain}
}

// patcher patches the objects of one resource.
type patcher struct {
	client   *kube.Client
	resource resource
	limit    *rate.Limiter
	options  Options

	conflicts, gone atomic.Int64

	mu   sync.Mutex // held while Progress is told
	done int
}

// Limits of a page of a list.
const (
	pageObjects = 500
	attempts    = 8
)

type page struct {
	Metadata struct {
		Continue string `json:"continue"`
	} `json:"metadata"`
	Items []object `json:"items"`
}

type object struct {
	Metadata struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	} `json:"metadata"`
}

func (p *patcher) run(ctx context.Context) (Migrated, error) {
	err := p.pages(ctx)
	return Migrated{p.resource.String(), p.done, int(p.conflicts.Load()), int(p.gone.Load())}, err
}

// pages lists the metadata of all objects, and patches those of each page.
func (p *patcher) pages(ctx context.Context) error {
	limit, next := pageObjects, ""
	for {
		query := url.Values{"limit": {fmt.Sprint(limit)}}
		if next != "" {
			query.Set("continue", next)
		}
		var got page
		err := p.client.Metadata(ctx, p.resource.path("", "")+"?"+query.Encode(), &got)
		if errors.Is(err, kube.ErrTooLarge) && limit > 1 {
			limit = max(limit/4, 1)
			continue
		}
		// If etcd compacts the revision of a list, the list goes on at a newer one: objects
		// made since then are under the current key.
		if r, ok := errors.AsType[*kube.Refusal](err); ok && r.Code == http.StatusGone && r.Continue != "" {
			next = r.Continue
			continue
		}
		if err != nil {
			return err
		}
		if err := p.patchAll(ctx, got.Items); err != nil {
			return err
		}
		if next = got.Metadata.Continue; next == "" {
			return nil
		}
	}
}

func (p *patcher) patchAll(ctx context.Context, items []object) error {
	if p.options.DryRun {
		p.count(len(items))
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	work := make(chan object)
	var workers sync.WaitGroup
	for range max(p.options.Workers, 1) {
		workers.Go(func() {
			for o := range work {
				if err := p.patch(ctx, o); err != nil {
					cancel(fmt.Errorf("%s: %w", p.resource.path(o.Metadata.Namespace, o.Metadata.Name), err))
				}
			}
		})
	}
	for _, o := range items {
		select {
		case work <- o:
		case <-ctx.Done():
		}
	}
	close(work)
	workers.Wait()
	return context.Cause(ctx)
}

func (p *patcher) count(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	if p.options.Progress != nil {
		p.options.Progress(p.resource.String(), p.done)
	}
}

// patch has one object written again. An empty patch changes nothing, so it never
// overwrites what somebody else writes, and it makes no object that was deleted.
func (p *patcher) patch(ctx context.Context, o object) error {
	path := p.resource.path(o.Metadata.Namespace, o.Metadata.Name) + "?fieldManager=kleidi-migrate"
	for try := 1; ; try++ {
		if err := p.limit.Wait(ctx); err != nil {
			return err
		}
		err := p.client.Do(ctx, http.MethodPatch, path, kube.MergePatch, struct{}{}, nil)
		r, answered := errors.AsType[*kube.Refusal](err)
		switch {
		case err == nil:
			p.count(1)
			return nil
		case kube.Refused(err, http.StatusNotFound):
			p.gone.Add(1)
			return nil
		case kube.Refused(err, http.StatusConflict):
			p.conflicts.Add(1)
		case answered && r.Code != http.StatusTooManyRequests && r.Code < 500:
			return err
		}
		if try == attempts {
			return err
		}
		if err := pause(ctx, try); err != nil {
			return err
		}
	}
}

// pause waits longer at each try.
func pause(ctx context.Context, try int) error {
	select {
	case <-time.After(50 * time.Millisecond << try):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// sorted returns names without duplicates.
func sorted(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}
