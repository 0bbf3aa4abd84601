package migrate

import (
	"context"
	"net/http"
	"strings"
	"testing"
)

// TestBusy: an API that has no time, or fails, is asked again.
func TestBusy(t *testing.T) {
	tries := map[string]int{} // under the server's lock
	lists := 0                // of one after the other
	s := &server{objects: 3, list: func(w http.ResponseWriter, _ *http.Request) bool {
		lists++
		code := map[int]int{1: http.StatusInternalServerError, 2: http.StatusTooManyRequests}[lists]
		if code != 0 {
			w.WriteHeader(code)
		}
		return code != 0
	}, refuse: func(name string) int {
		tries[name]++
		switch {
		case name == "secrets-0" && tries[name] < 3:
			return http.StatusTooManyRequests
		case name == "secrets-1" && tries[name] < 3:
			return http.StatusServiceUnavailable
		}
		return 0
	}}
	r, err := s.run(t)
	if err != nil || len(r.Resources) != 2 || r.Resources[1].Objects != 3 || r.Resources[1].Conflicts != 0 || r.Resources[1].Refused != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestListRefused: a list that is refused for good is not asked for again.
func TestListRefused(t *testing.T) {
	lists := 0
	s := &server{list: func(w http.ResponseWriter, _ *http.Request) bool {
		lists++
		w.WriteHeader(http.StatusForbidden)
		return true
	}}
	if _, err := s.run(t); err == nil || !strings.Contains(err.Error(), "403") || lists != 1 {
		t.Errorf("%d lists: %v", lists, err)
	}
}

// TestNotLoggedIn: without a valid login the migration ends: no other object will be written.
func TestNotLoggedIn(t *testing.T) {
	s := &server{objects: 50, refuse: func(name string) int {
		if name == "configmaps-3" {
			return http.StatusUnauthorized
		}
		return 0
	}}
	if r, err := s.run(t); err == nil || !strings.Contains(err.Error(), "401") || len(r.Resources) != 1 || r.Resources[0].Refused != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestNothingServed: resources that the API lacks may be skipped, but not all of them.
func TestNothingServed(t *testing.T) {
	s := &server{objects: 1, refuse: func(string) int { return 0 }}
	o := Options{Resources: []string{"none", "secrets"}, By: ByPatch, Workers: 1, Rate: 1e6, SkipUnserved: true}
	if r, err := Run(context.Background(), client(t, s), o); err != nil || len(r.Resources) != 1 || len(r.Unserved) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	o.Resources = []string{"none"}
	if _, err := Run(context.Background(), client(t, s), o); err == nil || !strings.Contains(err.Error(), "serves no resource none") {
		t.Error(err)
	}
}
