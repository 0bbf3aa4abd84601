package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// collections are the paths of the objects that kleidi applies, by kind.
var collections = map[string]string{
	"CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
	"ClusterRole":              "/apis/rbac.authorization.k8s.io/v1/clusterroles",
	"ClusterRoleBinding":       "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
	"KeyringNode":              nodes,
}

// servedWithin bounds how long the API takes to serve a resource after its definition.
const servedWithin = 30 * time.Second

// Apply creates the objects of a YAML file, or updates them. It returns when the API
// serves the resource of each CustomResourceDefinition. Fields of other managers stay.
func (c *Client) Apply(ctx context.Context, file string) error {
	for d := yaml.NewDecoder(strings.NewReader(file)); ; {
		var o map[string]any
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := c.apply(ctx, o); err != nil {
			return err
		}
	}
}

func (c *Client) apply(ctx context.Context, o map[string]any) error {
	kind, _ := o["kind"].(string)
	meta, _ := o["metadata"].(map[string]any)
	name, _ := meta["name"].(string)
	path := collections[kind]
	if path == "" || name == "" {
		return fmt.Errorf("apply %s %s: not one of kleidi's resources", kind, name)
	}
	err := c.Do(ctx, http.MethodPatch, path+"/"+url.PathEscape(name)+"?fieldManager=kleidi&force=true", ApplyPatch, o, nil)
	if err != nil {
		return fmt.Errorf("apply %s %s: %w", kind, name, err)
	}
	if kind == "CustomResourceDefinition" {
		return c.served(ctx, name)
	}
	return nil
}

// served waits until the API serves the resource whose definition has this name.
func (c *Client) served(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, servedWithin)
	defer cancel()
	resource, _, _ := strings.Cut(name, ".")
	for {
		err := c.Do(ctx, http.MethodGet, "/apis/"+APIVersion+"/"+resource+"?limit=1", "", nil, nil)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the API does not serve %s: %w", name, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
