package migrate

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// attempts is how often a call is made.
const attempts = 8

// final reports whether an error is an answer that would be the same again.
func final(err error) bool {
	r, answered := errors.AsType[*kube.Refusal](err)
	return answered && r.Code < 500 && r.Code != http.StatusRequestTimeout && r.Code != http.StatusTooManyRequests || errors.Is(err, kube.ErrTooLarge)
}

// again repeats a call while the API is busy or away.
func again(ctx context.Context, call func() error) error {
	for try := 1; ; try++ {
		err := call()
		if err == nil || final(err) || try == attempts {
			return err
		}
		if err := pause(ctx, try); err != nil {
			return err
		}
	}
}

// pause waits longer after each attempt.
func pause(ctx context.Context, try int) error {
	select {
	case <-time.After(50 * time.Millisecond << try):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
