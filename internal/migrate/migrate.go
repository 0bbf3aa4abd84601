// Package migrate makes kube-apiserver rewrite stored objects under the current key. It
// changes no object: if the cluster serves StorageVersionMigration,
// kube-controller-manager does the work; otherwise each object gets an empty patch.
// kube-apiserver writes an unchanged object only if it is stored under another key, so an
// interrupted migration that is run again continues where it stopped.
package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// Run migrates the named resources.
func Run(ctx context.Context, c *kube.Client, o Options) (*Result, error) {
	resources, unserved, err := discover(ctx, c, o.Resources)
	if err == nil && len(unserved) > 0 && (!o.SkipUnserved || len(resources) == 0) {
		err = seal.Errorf("", "name the resources of the EncryptionConfiguration with --resources", "migrate: the API serves no resource %s", seal.OneLine(unserved[0], 100))
	}
	if err != nil {
		return nil, err
	}
	r := &Result{DryRun: o.DryRun, By: o.By, Resources: []Migrated{}, Unserved: unserved}
	if r.By == "" {
		if r.By, err = choose(ctx, c); err != nil {
			return nil, err
		}
	}
	if o.DryRun {
		r.ClusterRole = ClusterRole(r.By, resources)
	}
	var left error // the first resource of which objects are left
	limit := rate.NewLimiter(rate.Limit(o.Rate), max(o.Workers, 1))
	for _, resource := range resources {
		m := Migrated{Name: resource.String()}
		switch {
		case r.By == ByAPI && o.DryRun:
		case r.By == ByAPI:
			q := &request{client: c, resource: resource, patience: usualPatience, waiting: o.Waiting}
			err = q.run(ctx)
		default:
			p := &patcher{client: c, resource: resource, limit: limit, options: o}
			m, err = p.run(ctx)
		}
		r.Resources = append(r.Resources, m)
		if err != nil {
			err = fmt.Errorf("migrate %s: %w", resource, refused(err))
			if m.Refused == 0 || m.Objects == 0 && m.Refused >= allRefused {
				return r, err
			}
			left = cmp.Or(left, err)
		}
	}
	return r, left
}

// patcher patches the objects of one resource.
type patcher struct {
	client   *kube.Client
	resource resource
	limit    *rate.Limiter
	options  Options

	conflicts, gone atomic.Int64

	mu      sync.Mutex // held while Progress is told
	done    int
	refused int
	first   error // the first refusal
}

// pageObjects is how many objects a page of a list has.
const pageObjects = 500

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
	if err == nil && p.refused > 0 {
		err = fmt.Errorf("%s refused by the API; the first is %w", seal.Count(p.refused, "object"), p.first)
		if p.done > 0 || !kube.Refused(err, http.StatusForbidden) {
			err = &seal.Error{Err: err, Hint: "correct these objects, or the admission policy that refuses them, and run kleidi migrate again"}
		}
	}
	return Migrated{p.resource.String(), p.done, int(p.conflicts.Load()), int(p.gone.Load()), p.refused}, err
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
		err := again(ctx, func() error {
			got = page{}
			return p.client.Metadata(ctx, p.resource.path("", "")+"?"+query.Encode(), &got)
		})
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
				err := p.patch(ctx, o)
				if err == nil {
					continue
				}
				err = fmt.Errorf("%s: %w", p.resource.path(o.Metadata.Namespace, o.Metadata.Name), err)
				if !p.goOn(err) {
					cancel(err)
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

// allRefused is the number of refusals after which a migration ends, unless some other
// object of the resource was written.
const allRefused = 20

// goOn notes an error, and reports whether the other objects are still tried: an object
// that the API refuses must not hold up the others.
func (p *patcher) goOn(err error) bool {
	if !final(err) || kube.Refused(err, http.StatusUnauthorized) || kube.Refused(err, http.StatusConflict) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused++
	p.first = cmp.Or(p.first, err)
	return p.done > 0 || p.refused < allRefused
}

// patch makes kube-apiserver rewrite one object. An empty patch changes nothing, so it
// never overwrites somebody else's write, and it does not recreate a deleted object.
func (p *patcher) patch(ctx context.Context, o object) error {
	path := p.resource.path(o.Metadata.Namespace, o.Metadata.Name) + "?fieldManager=kleidi-migrate"
	for try := 1; ; try++ {
		if err := p.limit.Wait(ctx); err != nil {
			return err
		}
		err := p.client.Rewrite(ctx, path)
		switch {
		case err == nil:
			p.count(1)
			return nil
		case kube.Refused(err, http.StatusNotFound):
			p.gone.Add(1)
			return nil
		case kube.Refused(err, http.StatusConflict):
			p.conflicts.Add(1)
		case final(err):
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
