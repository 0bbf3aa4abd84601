package migrate

import (
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
