// Package follow watches what several nodes do together, a rotation or the removal of a
// node, until every node has done its part. It asks the running serve again and again, and
// says what it waits for whenever that changes.
package follow

import (
	"context"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

// every is how often the running serve is asked, which keeps the progress in memory.
const every = 250 * time.Millisecond

// removalStart is how long even a command that does not wait gives the other nodes to
// follow. A KEK is staged only after the running nodes have followed.
const removalStart = 10 * time.Second

// forgiven is how long a watch goes on while the cluster store, or the backend of a wrapper,
// is unavailable: a kube-apiserver may restart, etcd may elect a leader, or Vault may be
// sealed. Meanwhile serve is asked only every 2 seconds (afterFault).
const (
	forgiven   = time.Minute
	afterFault = 2 * time.Second
)

// Options say how long to watch.
type Options struct {
	// Wait says to watch until the end.
	Wait bool
	// Timeout bounds the time, unless it is 0.
	Timeout time.Duration
	// Say shows a person what is waited for.
	Say func(message string)
}

// within returns a context that ends after the timeout.
func (o Options) within(ctx context.Context) (context.Context, context.CancelFunc) {
	if o.Timeout > 0 {
		return context.WithTimeout(ctx, o.Timeout)
	}
	return context.WithCancel(ctx)
}

// news returns a function that says a message, unless it was the last one said.
func (o Options) news() func(message string) {
	last := ""
	return func(message string) {
		if message != last {
			o.Say(message)
			last = message
		}
	}
}

// faults are the failures since the last answer.
type faults struct {
	first time.Time
	last  error
}

// forgive reports whether the watch goes on after an answer, or after an error.
func (f *faults) forgive(err error) bool {
	switch f.last = err; {
	case err == nil:
		f.first = time.Time{}
		return true
	case f.first.IsZero():
		f.first = time.Now()
	}
	return seal.CauseOf(err) == seal.CauseUnavailable && time.Since(f.first) < forgiven
}

// pause waits until it is time to ask again. It reports whether ctx is still open.
func (f *faults) pause(ctx context.Context) bool {
	pause := every
	if f.last != nil {
		pause = afterFault
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(pause):
		return true
	}
}

// or returns what is wrong, or else the message.
func (f *faults) or(message string) string {
	if f.last != nil {
		return "waiting: " + seal.OneLine(f.last.Error(), 300)
	}
	return message
}

// Serve is the running serve that drives a rotation.
type Serve struct {
	// Rotate asks for the rotation again.
	Rotate func(context.Context, admin.RotateRequest) (admin.KeyringState, error)
	// Progress reads how far the rotation is.
	Progress func(context.Context) (admin.KeyringState, error)
}

// Rotation watches a rotation of several nodes, which req asked for and s began, and
// returns its last state. While nothing is staged it asks for the rotation again, always in
// place of the KEK that was current at first, so that no repetition rotates twice. replaced
// reports that another KEK than the watched one is current at the end.
func Rotation(ctx context.Context, o Options, serve Serve, req admin.RotateRequest, s admin.KeyringState) (last admin.KeyringState, replaced bool, err error) {
	ctx, cancel := o.within(ctx)
	defer cancel()
	former := s.CurrentKeyID
	if s.Former != "" {
		former = s.Former
	}
	fresh, say, faults := s.Rotation.StagedKeyID, o.news(), faults{}
	for o.Wait && s.Rotation != nil && s.Rotation.Phase != admin.RotationDone && ctx.Err() == nil {
		say(faults.or(text.Progress(s.Rotation)))
		if !faults.pause(ctx) {
			break
		}
		next, err := serve.next(ctx, req, former, fresh, s)
		switch {
		case err != nil && ctx.Err() != nil:
			continue // the watch is over
		case !faults.forgive(err):
			if fresh != "" && !req.Abort {
				err = seal.AddHint(err, "the rotation was not aborted; watch it with kleidi rotate --continue --wait")
			}
			return s, false, err
		case err != nil:
			continue
		}
		s = next
		if fresh == "" && s.Rotation != nil {
			fresh = s.Rotation.StagedKeyID
		}
	}
	if s.Rotation == nil { // the other nodes were removed meanwhile
		s.Rotation = &admin.Rotation{Phase: admin.RotationDone}
	}
	if s.CurrentKeyID != former {
		s.Former = former
	}
	replaced = s.Rotation.Phase == admin.RotationDone && fresh != "" && s.CurrentKeyID != fresh && !req.Abort
	return s, replaced, nil
}

// next asks for the rotation again while nothing is staged, and else for its progress.
func (serve Serve) next(ctx context.Context, req admin.RotateRequest, former, fresh seal.KeyID, s admin.KeyringState) (admin.KeyringState, error) {
	if fresh == "" && s.CurrentKeyID == former && !req.Continue && !req.Abort {
		req.Replace = former
		return serve.Rotate(ctx, req)
	}
	return serve.Progress(ctx)
}

// Removal takes the steps of a removal until it is done, or until it is no longer waited
// for, and returns the last state with the changes of every step. An error ends the watch, and
// the changes that were made before it are then said. While the end is waited for, an error
// with the cause seal.CauseUnavailable ends it only if it lasts for a minute, or comes from the
// first step.
func Removal(ctx context.Context, o Options, step func(admin.RemoveNodesRequest) (admin.NodeRemoval, error), req admin.RemoveNodesRequest) (admin.NodeRemoval, error) {
	ctx, cancel := o.within(ctx)
	defer cancel()
	var r admin.NodeRemoval
	say, begun, faults := o.news(), time.Now(), faults{}
	for {
		next, err := step(req)
		if err != nil && (!o.Wait || !req.Begun || !faults.forgive(err)) {
			for _, change := range r.Changes {
				o.Say(change)
			}
			return r, err
		}
		if err == nil {
			next.Changes = append(r.Changes, next.Changes...)
			faults.forgive(nil)
			r, req.Begun = next, true
		}
		starts := r.Phase == admin.RemovalFollowing && time.Since(begun) < removalStart
		if r.Phase == admin.RemovalDone || !o.Wait && !starts || ctx.Err() != nil {
			return r, nil
		}
		say(faults.or(text.Removing(r)))
		if !faults.pause(ctx) {
			return r, nil
		}
	}
}
