package node

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Again is Eventually for a command whose failure a busy machine may cause: with an error
// that holds one of these texts. Any other error fails the test at once.
func Again(t testing.TB, within time.Duration, what string, run func() error, may ...string) {
	t.Helper()
	Eventually(t, within, what, func() error {
		err := run()
		if err != nil {
			if !HasOneOf(err.Error(), may) {
				t.Fatalf("%s: %v", what, err)
			}
			t.Logf("again: %v", err)
		}
		return err
	})
}

// HasOneOf reports whether a text contains one of the parts.
func HasOneOf(text string, parts []string) bool {
	return slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(text, part) })
}

// Retry makes a call up to 10 times, until it succeeds or its error is final. It returns the
// last error.
func Retry(call func() error, final func(error) bool) error {
	_, err := backoff.Retry(context.Background(), func() (struct{}, error) {
		err := call()
		if err != nil && final(err) {
			err = backoff.Permanent(err)
		}
		return struct{}{}, err
	}, backoff.WithBackOff(backoff.NewConstantBackOff(200*time.Millisecond)), backoff.WithMaxTries(10), backoff.WithMaxElapsedTime(0))
	return err
}

// JoinAgain are the errors of kleidi join that a busy machine may cause: the join took too
// long for the admitting node, an earlier one has just broken off, or etcd had an election.
var JoinAgain = []string{"check that kleidi serve runs there", "another join of this node is in progress", "etcdserver: "}

// SetUpAgain are the errors of kleidi cluster setup that a busy cluster may cause: no
// controller signs within a minute, or kube-apiserver is late to serve a new resource or to
// apply a new role.
var SetUpAgain = []string{"but no certificate came within", "can't read the cluster store at", "the API does not serve"}

// Eventually repeats ready until it returns nil, and fails the test after the given
// time.
func Eventually(t testing.TB, within time.Duration, what string, ready func() error) {
	t.Helper()
	start := time.Now()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			t.Logf("%s: after %s", what, time.Since(start).Round(100*time.Millisecond))
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("%s: not within %s: %v", what, within, err)
		case <-tick.C:
		}
	}
}
