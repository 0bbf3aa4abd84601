package migrate

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

const migrations = "/apis/storagemigration.k8s.io/v1/storageversionmigrations"

// choose returns the way that this cluster offers. Only v1 of StorageVersionMigration
// counts: earlier versions are disabled by default.
func choose(ctx context.Context, c *kube.Client) (string, error) {
	err := c.Do(ctx, http.MethodGet, "/apis/storagemigration.k8s.io/v1", "", nil, nil)
	switch {
	case err == nil:
		return ByAPI, nil
	case kube.Refused(err, http.StatusNotFound):
		return ByPatch, nil
	}
	return "", fmt.Errorf("migrate: %w", refused(err))
}

// migration is a StorageVersionMigration.
type migration struct {
	APIVersion string            `json:"apiVersion,omitempty"`
	Kind       string            `json:"kind,omitempty"`
	Metadata   migrationMetadata `json:"metadata"`
	Spec       migrationSpec     `json:"spec"`
	Status     struct {
		Conditions []condition `json:"conditions"`
	} `json:"status,omitzero"`
}

type migrationMetadata struct {
	Name         string `json:"name,omitempty"`
	GenerateName string `json:"generateName,omitempty"`
}

type migrationSpec struct {
	Resource migrationResource `json:"resource"`
}

type migrationResource struct {
	Group    string `json:"group"`
	Resource string `json:"resource"`
}

type condition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Message string `json:"message"`
}

// patience is how long a migration may take to begin. kube-controller-manager waits until
// its garbage collector's cache of the resource is as new as the request. On a quiet
// cluster the cache moves on only with the watch's bookmarks, about once a minute.
type patience struct {
	poll time.Duration
	// explain is the time after which the operator is told why nothing happens.
	explain time.Duration
	// unnoticed is the time after which no controller is believed to run.
	unnoticed time.Duration
}

// usualPatience gives up late: a healthy cluster was seen to begin after 88 seconds.
var usualPatience = patience{poll: time.Second, explain: 5 * time.Second, unnoticed: 5 * time.Minute}

// request is a StorageVersionMigration that kube-controller-manager is asked for.
type request struct {
	client   *kube.Client
	resource resource
	patience patience
	// waiting is told once why nothing happens, if the migration does not begin soon.
	waiting func(message string)

	made      migration
	begun     bool
	since     time.Time // the creation, then the last answer after the beginning
	explained bool
}

func (q *request) path() string { return migrations + "/" + q.made.Metadata.Name }

// run makes the StorageVersionMigration, waits for its end, and removes it.
func (q *request) run(ctx context.Context) error {
	m := migration{APIVersion: "storagemigration.k8s.io/v1", Kind: "StorageVersionMigration",
		Metadata: migrationMetadata{GenerateName: "kleidi-" + q.resource.name + "-"}, Spec: migrationSpec{migrationResource{q.resource.group, q.resource.name}}}
	if err := q.client.Do(ctx, http.MethodPost, migrations, kube.JSON, m, &q.made); err != nil {
		return err
	}
	q.since = time.Now()
	for {
		if ended, err := q.look(ctx); ended || err != nil {
			return err
		}
		q.explain()
		select {
		case <-time.After(q.patience.poll):
		case <-ctx.Done():
			return &seal.Error{Err: ctx.Err(), Hint: "StorageVersionMigration " + q.made.Metadata.Name + " goes on without kleidi"}
		}
	}
}

// look reads the state of the migration once.
func (q *request) look(ctx context.Context) (ended bool, err error) {
	late := time.Since(q.since) > q.patience.unnoticed
	if err := q.client.Do(ctx, http.MethodGet, q.path(), "", nil, &q.made); final(err) || err != nil && late {
		return false, err
	} else if err != nil {
		return false, nil // kube-apiserver may restart, or have too much to do
	}
	for _, s := range q.made.Status.Conditions {
		q.begun, q.since = true, time.Now()
		switch {
		case s.Status != "True":
		case s.Type == "Succeeded":
			return true, q.remove(ctx)
		case s.Type == "Failed":
			return false, &seal.Error{Err: fmt.Errorf("StorageVersionMigration %s has failed: %s", q.made.Metadata.Name, seal.OneLine(s.Message, 300)), Hint: "run kleidi migrate --by=patch"}
		}
	}
	if !q.begun && late {
		err := fmt.Errorf("kube-controller-manager has not begun with StorageVersionMigration %s in %v", q.made.Metadata.Name, q.patience.unnoticed)
		return false, &seal.Error{Err: errors.Join(err, q.remove(ctx)), Hint: "run kleidi migrate --by=patch"}
	}
	return false, nil
}

// remove removes the StorageVersionMigration, which has done its work.
func (q *request) remove(ctx context.Context) error {
	err := again(ctx, func() error { return q.client.Do(ctx, http.MethodDelete, q.path(), "", nil, nil) })
	if kube.Refused(err, http.StatusNotFound) { // a call without an answer has removed it
		return nil
	}
	return err
}

// explain tells the operator once why nothing happens.
func (q *request) explain() {
	if q.begun || q.explained || q.waiting == nil || time.Since(q.since) < q.patience.explain {
		return
	}
	q.explained = true
	q.waiting(fmt.Sprintf("%s: waiting for kube-controller-manager, up to %v: it begins only when its garbage collector's cache is as new as the request, which takes a minute or two on a quiet cluster; --by=patch does not wait",
		seal.OneLine(q.resource.String(), 100), q.patience.unnoticed))
}

// refused adds the next step to an error of the API.
func refused(err error) error {
	var e *seal.Error
	switch {
	case errors.As(err, &e):
		return err
	case kube.Refused(err, http.StatusForbidden):
		return &seal.Error{Err: err, Hint: "kleidi migrate --dry-run shows the ClusterRole that the user in the kubeconfig needs"}
	}
	return &seal.Error{Err: err, Hint: hintAgain}
}
