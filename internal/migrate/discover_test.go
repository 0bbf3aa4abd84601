package migrate

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// TestResource: names and paths are those of the API.
func TestResource(t *testing.T) {
	secrets := resource{version: "v1", name: "secrets", namespaced: true}
	crontabs := resource{group: "stable.example.com", version: "v2", name: "crontabs"}
	for want, got := range map[string]string{
		"secrets": secrets.String(), "crontabs.stable.example.com": crontabs.String(),
		"/api/v1/secrets": secrets.path("", ""), "/api/v1/namespaces/default/secrets/token": secrets.path("default", "token"),
		"/apis/stable.example.com/v2/crontabs/nightly": crontabs.path("", "nightly"),
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestVersions: a resource that the preferred version of its group lacks is found in
// another, by its name and by wildcards. A resource of several versions is found once, in
// the preferred one.
func TestVersions(t *testing.T) {
	answers := map[string]string{
		"/apis": `{"groups": [{"name": "gateway.networking.k8s.io", "preferredVersion": {"version": "v1"},
			"versions": [{"version": "v1alpha2"}, {"version": "v1"}, {"version": "v1beta1"}]}]}`,
		"/api/v1":                                  `{"resources": [{"name": "secrets", "verbs": ["list", "patch"]}]}`,
		"/apis/gateway.networking.k8s.io/v1":       `{"resources": [{"name": "gateways", "verbs": ["list", "patch"]}]}`,
		"/apis/gateway.networking.k8s.io/v1beta1":  `{"resources": [{"name": "gateways", "verbs": ["list", "patch"]}]}`,
		"/apis/gateway.networking.k8s.io/v1alpha2": `{"resources": [{"name": "tcproutes", "verbs": ["list", "patch"]}, {"name": "tcproutes/status", "verbs": ["patch"]}]}`,
	}
	c := client(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, answers[r.URL.Path]) }))
	gateways, routes := "/apis/gateway.networking.k8s.io/v1/gateways", "/apis/gateway.networking.k8s.io/v1alpha2/tcproutes"
	for name, want := range map[string][]string{
		"tcproutes.gateway.networking.k8s.io": {routes},
		"gateways.gateway.networking.k8s.io":  {gateways},
		"*.gateway.networking.k8s.io":         {gateways, routes},
		"*.*":                                 {"/api/v1/secrets", gateways, routes},
		"*.example.com":                       nil,
	} {
		found, unserved, err := discover(t.Context(), c, []string{name})
		var paths []string
		for _, r := range found {
			paths = append(paths, r.path("", ""))
		}
		if err != nil || !slices.Equal(paths, want) || (len(unserved) > 0) != (want == nil) {
			t.Errorf("%s: %v, %v, %v", name, paths, unserved, err)
		}
	}
}

// TestDiscoverStored: a resource is migrated only if it can be listed and patched. A
// subresource never is: its objects are those of the resource itself.
func TestDiscoverStored(t *testing.T) {
	verbs := map[string][]string{
		"secrets": {"create", "list", "patch"}, "secrets/status": {"list", "patch"},
		"bindings": {"create"}, "listed": {"list"}, "patched": {"patch"},
	}
	api := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		all := []any{}
		for name, verbs := range verbs {
			all = append(all, map[string]any{"name": name, "namespaced": true, "verbs": verbs})
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"groups": []any{}, "resources": all})
	})
	secrets := []resource{{version: "v1", name: "secrets", namespaced: true}}
	for _, want := range []struct {
		names    []string
		found    []resource
		unserved []string
	}{
		{[]string{"*."}, secrets, nil},
		{[]string{"*.*"}, secrets, nil},
		{[]string{"secrets", "*."}, secrets, nil},
		{[]string{"listed", "patched", "bindings", "secrets/status"}, nil, []string{"bindings", "listed", "patched", "secrets/status"}},
	} {
		found, unserved, err := discover(t.Context(), client(t, api), want.names)
		if err != nil || !slices.Equal(found, want.found) || !slices.Equal(unserved, want.unserved) {
			t.Errorf("%s: %v, unserved %s, %v", want.names, found, unserved, err)
		}
	}
}

// TestClusterRole: the role allows what the way of migrating needs, and nothing else. The
// API's way needs no right on any object.
func TestClusterRole(t *testing.T) {
	all := []resource{{version: "v1", name: "secrets"}, {version: "v1", name: "configmaps"}, {group: "apps", version: "v1", name: "deployments"}}
	role := ClusterRole(ByPatch, all)
	for _, rule := range []string{"apiGroups: [\"\"]\n    resources: [configmaps, secrets]\n    verbs: [list, patch]\n", "apiGroups: [\"apps\"]\n    resources: [deployments]\n    verbs: [list, patch]\n"} {
		if !strings.Contains(role, rule) {
			t.Errorf("%s has no %s", role, rule)
		}
	}
	if strings.Count(role, "verbs") != 2 {
		t.Error(role)
	}
	if role := ClusterRole(ByAPI, all); strings.Contains(role, "secrets") || !strings.Contains(role, "storageversionmigrations") {
		t.Error(role)
	}
}

// TestSorted: the names are sorted, without duplicates.
func TestSorted(t *testing.T) {
	if got := sorted([]string{"b", "a", "b"}); !slices.Equal(got, []string{"a", "b"}) {
		t.Error(got)
	}
}
