package migrate

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// resource is a resource that the API serves.
type resource struct {
	group, version, name string
	namespaced           bool
}

// String returns the name in the form of an EncryptionConfiguration.
func (r resource) String() string {
	if r.group == "" {
		return r.name
	}
	return r.name + "." + r.group
}

// api returns the path of the group's version.
func (r resource) api() string {
	if r.group == "" {
		return "/api/" + r.version
	}
	return "/apis/" + r.group + "/" + r.version
}

// path returns the path of an object or, without a name, of the list of all objects.
func (r resource) path(namespace, name string) string {
	p := r.api()
	if namespace != "" {
		p += "/namespaces/" + namespace
	}
	return strings.TrimSuffix(p+"/"+r.name+"/"+name, "/")
}

type groupList struct {
	Groups []struct {
		Name             string         `json:"name"`
		PreferredVersion groupVersion   `json:"preferredVersion"`
		Versions         []groupVersion `json:"versions"`
	} `json:"groups"`
}

type groupVersion struct {
	Version string `json:"version"`
}

type resourceList struct {
	Resources []struct {
		Name       string   `json:"name"`
		Namespaced bool     `json:"namespaced"`
		Verbs      []string `json:"verbs"`
	} `json:"resources"`
}

// discover returns the resources that names stand for, each in the first version that
// serves it, and the names for which the API serves no resource.
func discover(ctx context.Context, c *kube.Client, names []string) (all []resource, unserved []string, err error) {
	var groups groupList
	if err := c.Do(ctx, http.MethodGet, "/apis", "", nil, &groups); err != nil {
		return nil, nil, fmt.Errorf("migrate: the API's groups: %w", unanswered(err))
	}
	versions := map[string][]string{"": {"v1"}}
	for _, g := range groups.Groups {
		// The preferred version need not serve every resource of its group.
		versions[g.Name] = []string{g.PreferredVersion.Version}
		for _, v := range g.Versions {
			if v != g.PreferredVersion {
				versions[g.Name] = append(versions[g.Name], v.Version)
			}
		}
	}
	for _, name := range sorted(slices.Clone(names)) {
		found, err := named(ctx, c, name, versions)
		if err != nil {
			return nil, nil, fmt.Errorf("migrate: %w", err)
		}
		if len(found) == 0 {
			unserved = append(unserved, name)
		}
		for _, r := range found {
			if !slices.Contains(all, r) {
				all = append(all, r)
			}
		}
	}
	return all, unserved, nil
}

// unanswered hints at a kube-apiserver that restarts, unless the API has answered.
func unanswered(err error) error {
	if _, answered := errors.AsType[*kube.Refusal](err); answered {
		return err
	}
	return seal.WithHint(err, "if kubelet restarts kube-apiserver, wait until it answers (kubectl get --raw /readyz), and run the command again")
}

// named returns the resources of one name, which may be a wildcard. There may be none.
func named(ctx context.Context, c *kube.Client, name string, versions map[string][]string) (found []resource, err error) {
	kind, group, _ := strings.Cut(name, ".")
	groups := []string{group}
	if kind == "*" && group == "*" {
		groups = slices.Sorted(maps.Keys(versions))
	}
	for _, g := range groups {
		seen := map[string]bool{}
		for _, version := range versions[g] {
			var list resourceList
			if err := c.Do(ctx, http.MethodGet, resource{group: g, version: version}.api(), "", nil, &list); err != nil {
				return nil, err
			}
			for _, r := range list.Resources {
				stored := slices.Contains(r.Verbs, "list") && slices.Contains(r.Verbs, "patch") && !strings.Contains(r.Name, "/")
				if stored && !seen[r.Name] && (kind == "*" || kind == r.Name) {
					seen[r.Name] = true
					found = append(found, resource{g, version, r.Name, r.Namespaced})
				}
			}
		}
	}
	return found, nil
}

// ClusterRole returns the role that a migration needs, as YAML.
func ClusterRole(by string, resources []resource) string {
	var b strings.Builder
	b.WriteString("apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata:\n  name: kleidi-migrate\nrules:\n")
	if by == ByAPI {
		b.WriteString("  - apiGroups: [storagemigration.k8s.io]\n    resources: [storageversionmigrations]\n    verbs: [create, get, delete]\n")
		return b.String()
	}
	byGroup := map[string][]string{}
	for _, r := range resources {
		byGroup[r.group] = append(byGroup[r.group], r.name)
	}
	groups := []string{}
	for g := range byGroup {
		groups = append(groups, g)
	}
	for _, g := range sorted(groups) {
		fmt.Fprintf(&b, "  - apiGroups: [%q]\n    resources: [%s]\n    verbs: [list, patch]\n", g, strings.Join(sorted(byGroup[g]), ", "))
	}
	return b.String()
}

// sorted returns names without duplicates.
func sorted(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}
