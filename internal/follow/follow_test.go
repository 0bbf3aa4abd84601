package follow

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
)

// state returns the state of a rotation.
func state(current seal.KeyID, phase admin.RotationPhase, staged seal.KeyID) admin.KeyringState {
	return admin.KeyringState{CurrentKeyID: current, Rotation: &admin.Rotation{Phase: phase, StagedKeyID: staged}}
}

// TestRotation: the rotation is asked for again, in place of the same KEK, until something
// is staged, and only watched from then on.
func TestRotation(t *testing.T) {
	preparing, staged := state("k1-a", admin.RotationPreparing, ""), state("k1-a", admin.RotationStaged, "k1-b")
	for name, row := range map[string]struct {
		req      admin.RotateRequest
		first    admin.KeyringState
		answers  []admin.KeyringState
		rotates  int
		former   seal.KeyID
		replaced bool
	}{
		"nothing is staged at first": {first: preparing, answers: []admin.KeyringState{preparing, staged, state("k1-b", admin.RotationDone, "")}, rotates: 2, former: "k1-a"},
		"staged":                     {first: staged, answers: []admin.KeyringState{staged, state("k1-b", admin.RotationDone, "")}, former: "k1-a"},
		"the others are removed":     {first: preparing, answers: []admin.KeyringState{{CurrentKeyID: "k1-b"}}, rotates: 1, former: "k1-a"},
		"another KEK":                {first: staged, answers: []admin.KeyringState{state("k1-c", admin.RotationDone, "")}, former: "k1-a", replaced: true},
		"aborted elsewhere":          {first: staged, answers: []admin.KeyringState{state("k1-a", admin.RotationDone, "")}, replaced: true},
		"aborted here":               {req: admin.RotateRequest{Abort: true}, first: staged, answers: []admin.KeyringState{state("k1-a", admin.RotationDone, "")}},
		"continued":                  {req: admin.RotateRequest{Continue: true}, first: preparing, answers: []admin.KeyringState{staged, state("k1-b", admin.RotationDone, "")}, former: "k1-a"},
	} {
		synctest.Test(t, func(t *testing.T) {
			rotates, asked := 0, 0
			progress := func(context.Context) (admin.KeyringState, error) {
				asked++
				return row.answers[asked-1], nil
			}
			serve := Serve{Progress: progress, Rotate: func(ctx context.Context, req admin.RotateRequest) (admin.KeyringState, error) {
				if rotates++; req.Replace != "k1-a" {
					t.Errorf("%s: asked to replace %q", name, req.Replace)
				}
				return progress(ctx)
			}}
			s, replaced, err := Rotation(t.Context(), Options{Wait: true, Say: func(string) {}}, serve, row.req, row.first)
			if err != nil || rotates != row.rotates || asked != len(row.answers) || s.Former != row.former || replaced != row.replaced {
				t.Errorf("%s: %+v, replaced %v, %d rotates, %d answers, %v", name, s, replaced, rotates, asked, err)
			}
		})
	}
}

// TestRotationEnds: a command that does not wait asks nothing, a timeout ends the watch
// without an error, and an error ends it at once. What is waited for is said once.
func TestRotationEnds(t *testing.T) {
	staged := state("k1-a", admin.RotationStaged, "k1-b")
	for name, row := range map[string]struct {
		o     Options
		fails error
		asked bool
		said  int
	}{
		"without waiting": {o: Options{}},
		"timeout":         {o: Options{Wait: true, Timeout: time.Minute}, asked: true, said: 1},
		"an error":        {o: Options{Wait: true}, fails: errors.New("serve is gone"), asked: true, said: 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			asked, said := false, 0
			row.o.Say = func(string) { said++ }
			s, replaced, err := Rotation(t.Context(), row.o, Serve{Progress: func(context.Context) (admin.KeyringState, error) {
				asked = true
				return staged, row.fails
			}}, admin.RotateRequest{}, staged)
			if !errors.Is(err, row.fails) || replaced || asked != row.asked || said != row.said || s.Rotation.Phase != admin.RotationStaged {
				t.Errorf("%s: %+v, replaced %v, asked %v, said %d times, %v", name, s, replaced, asked, said, err)
			}
		})
	}
}

// TestRemoval: the steps go on until the removal is done or no longer waited for. Each
// step but the first says that it is not the first, and the changes of all are kept.
func TestRemoval(t *testing.T) {
	following, staged, done := admin.RemovalFollowing, admin.RemovalStaged, admin.RemovalDone
	for name, row := range map[string]struct {
		o      Options
		phases []admin.RemovalPhase // the last one stays
		last   admin.RemovalPhase
		least  int
	}{
		"until it is done":                {Options{Wait: true}, []admin.RemovalPhase{following, staged, done}, done, 3},
		"without waiting, they follow":    {Options{}, []admin.RemovalPhase{following, staged}, staged, 2},
		"without waiting, nobody follows": {Options{}, []admin.RemovalPhase{following}, following, 10},
		"timeout":                         {Options{Wait: true, Timeout: time.Minute}, []admin.RemovalPhase{following, staged}, staged, 3},
	} {
		synctest.Test(t, func(t *testing.T) {
			steps, begun := 0, time.Now()
			row.o.Say = func(string) {}
			r, err := Removal(t.Context(), row.o, func(req admin.RemoveNodesRequest) (admin.NodeRemoval, error) {
				if req.Begun != (steps > 0) {
					t.Errorf("%s: step %d says %v", name, steps, req.Begun)
				}
				steps++
				return admin.NodeRemoval{Phase: row.phases[min(steps, len(row.phases))-1], Changes: []string{"a step"}}, nil
			}, admin.RemoveNodesRequest{})
			if err != nil || r.Phase != row.last || steps < row.least || len(r.Changes) != steps {
				t.Errorf("%s: %+v after %d steps, %v", name, r, steps, err)
			}
			if time.Since(begun) > 2*time.Minute {
				t.Errorf("%s: it took %v", name, time.Since(begun))
			}
		})
	}
}

// TestRemovalFails: an error ends a removal, except a later one of the cluster store while it
// is waited for.
func TestRemovalFails(t *testing.T) {
	gone := errors.New("serve is gone")
	for name, row := range map[string]struct {
		wait   bool
		begins bool
		fails  error
	}{
		"at first":            {true, false, gone},
		"later":               {true, true, gone},
		"at first, the store": {true, false, away},
		"without waiting":     {false, true, away},
	} {
		synctest.Test(t, func(t *testing.T) {
			begun := time.Now()
			_, err := Removal(t.Context(), Options{Wait: row.wait, Say: func(string) {}}, func(req admin.RemoveNodesRequest) (admin.NodeRemoval, error) {
				if row.begins && !req.Begun {
					return admin.NodeRemoval{Phase: admin.RemovalFollowing}, nil
				}
				return admin.NodeRemoval{}, row.fails
			}, admin.RemoveNodesRequest{})
			if !errors.Is(err, row.fails) || time.Since(begun) > time.Second {
				t.Errorf("%s: after %v: %v", name, time.Since(begun), err)
			}
		})
	}
}

// away is what the running serve answers while its cluster store is away.
var away = &seal.Error{Cause: seal.CauseUnavailable, Err: errors.New("the cluster store: connection refused")}

// TestStoreAway: a watch goes on without the cluster store for a minute, again and again, and
// says once what is wrong.
func TestStoreAway(t *testing.T) {
	for name, row := range map[string]struct {
		after, lasts time.Duration // of the first answers, and of the failures after them
		ends         bool
	}{
		"short":       {0, forgiven - time.Second, false},
		"short, late": {time.Hour, forgiven - time.Second, false},
		"long":        {time.Hour, forgiven + time.Second, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			begun, said := time.Now(), []string{}
			o := Options{Wait: true, Say: func(m string) { said = append(said, m) }}
			failing := func() error {
				if since := time.Since(begun); since >= row.after && since < row.after+row.lasts {
					return away
				}
				return nil
			}
			phase := func() bool { return time.Since(begun) > 2*time.Hour }
			s, _, err := Rotation(t.Context(), o, Serve{Progress: func(context.Context) (admin.KeyringState, error) {
				if phase() {
					return state("k1-b", admin.RotationDone, ""), failing()
				}
				return state("k1-a", admin.RotationStaged, "k1-b"), failing()
			}}, admin.RotateRequest{}, state("k1-a", admin.RotationStaged, "k1-b"))
			if errors.Is(err, away) != row.ends || err == nil && s.CurrentKeyID != "k1-b" {
				t.Errorf("%s: %+v, %v", name, s, err)
			}
			if err != nil && !strings.HasSuffix(err.Error(), "; the rotation was not aborted; watch it with kleidi rotate --continue --wait") {
				t.Errorf("%s: %v", name, err)
			}
			if i := slices.Index(said, "waiting: the cluster store: connection refused"); i < 0 || slices.Contains(said[i+1:], said[i]) {
				t.Errorf("%s: said %q", name, said)
			}

			begun = time.Now()
			first := true
			r, err := Removal(t.Context(), o, func(req admin.RemoveNodesRequest) (admin.NodeRemoval, error) {
				err := failing()
				if first {
					first, err = false, nil
				}
				if phase() {
					return admin.NodeRemoval{Phase: admin.RemovalDone}, err
				}
				return admin.NodeRemoval{Phase: admin.RemovalStaged, Changes: []string{"a step"}}, err
			}, admin.RemoveNodesRequest{})
			if errors.Is(err, away) != row.ends || err == nil && r.Phase != admin.RemovalDone || slices.Contains(said, "a step") != row.ends {
				t.Errorf("%s: removal %+v, %v, said %q", name, r, err, said)
			}
		})
	}
}

// TestNews: a message that repeats the one before it is not said again.
func TestNews(t *testing.T) {
	var said []string
	say := Options{Say: func(m string) { said = append(said, m) }}.news()
	for _, m := range []string{"a", "a", "b", "b", "a"} {
		say(m)
	}
	if !slices.Equal(said, []string{"a", "b", "a"}) {
		t.Error(said)
	}
}
