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
// counts: earlier ones are switched off by default.
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

// Times of the wait for a migration.
const (
	pollEvery = time.Second
	// unnoticed bounds the time until kube-controller-manager begins. It first waits for the
	// garbage collector's caches.
	unnoticed = 90 * time.Second
)

// later moves the deadline on while a migration is under way.
func later(deadline time.Time, begun bool) time.Time {
	if begun {
		return time.Now().Add(unnoticed)
	}
	return deadline
}

// byAPI makes a StorageVersionMigration, waits for its end, and removes it.
func byAPI(ctx context.Context, c *kube.Client, r resource) error {
	m := migration{APIVersion: "storagemigration.k8s.io/v1", Kind: "StorageVersionMigration",
		Metadata: migrationMetadata{GenerateName: "kleidi-" + r.name + "-"}, Spec: migrationSpec{migrationResource{r.group, r.name}}}
	if err := c.Do(ctx, http.MethodPost, migrations, kube.JSON, m, &m); err != nil {
		return err
	}
	path := migrations + "/" + m.Metadata.Name
	begun := false
	deadline := time.Now().Add(unnoticed)
	for {
		var answered *kube.Refusal
		if err := c.Do(ctx, http.MethodGet, path, "", nil, &m); errors.As(err, &answered) {
			return err
		} else if err != nil && time.Now().After(deadline) { // kube-apiserver may restart
			return err
		} else if err == nil {
			deadline = later(deadline, begun)
		}
		for _, s := range m.Status.Conditions {
			switch begun = true; {
			case s.Status != "True":
			case s.Type == "Succeeded":
				return c.Do(ctx, http.MethodDelete, path, "", nil, nil)
			case s.Type == "Failed":
				return &seal.Error{Err: fmt.Errorf("StorageVersionMigration %s has failed: %s", m.Metadata.Name, seal.OneLine(s.Message, 300)), Hint: "run kleidi migrate --by=patch"}
			}
		}
		if !begun && time.Now().After(deadline) {
			err := errors.Join(fmt.Errorf("kube-controller-manager has not begun with StorageVersionMigration %s", m.Metadata.Name), c.Do(ctx, http.MethodDelete, path, "", nil, nil))
			return &seal.Error{Err: err, Hint: "run kleidi migrate --by=patch"}
		}
		select {
		case <-time.After(pollEvery):
		case <-ctx.Done():
			return &seal.Error{Err: ctx.Err(), Hint: "StorageVersionMigration " + m.Metadata.Name + " goes on without kleidi"}
		}
	}
}
