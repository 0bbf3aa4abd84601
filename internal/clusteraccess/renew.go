package clusteraccess

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/beezy-dev/kleidi/internal/files"
)

// State returns the state after the last round of Renew.
func (a *Access) State() State {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state
}

const (
	// How often Renew reads the certificate file, since cluster setup may replace it.
	lookEvery = time.Hour
	// How often Renew reads a request that waits for its approval; more often if the
	// certificate is short-lived.
	askEvery = time.Minute
	// How often Renew logs a certificate that ends soon.
	warnEvery = 24 * time.Hour
)

// Renew keeps the client certificate from ending, until ctx ends. It makes a request
// once a month is left, or a third of a shorter time, and takes the certificate when an
// administrator has approved the request.
func (a *Access) Renew(ctx context.Context, log *slog.Logger) {
	var said string
	var warned time.Time
	for ctx.Err() == nil {
		next, err := a.renew(ctx, log)
		a.mu.Lock()
		a.state.Problem = err
		a.mu.Unlock()
		text := fmt.Sprint(err)
		if err != nil && ctx.Err() == nil && (text != said || time.Since(warned) > warnEvery) {
			log.Warn("the client certificate for the cluster store ends soon", "notAfter", a.State().NotAfter, "error", err)
			warned = time.Now()
		}
		said = text
		select {
		case <-ctx.Done():
		case <-time.After(next):
		}
	}
}

// renew makes one round, and returns when the next one is due.
func (a *Access) renew(ctx context.Context, log *slog.Logger) (next time.Duration, err error) {
	c, path, err := a.Leaf()
	if err != nil {
		a.setEnd(time.Time{})
		return askEvery, nil // a caller that needs the certificate reports the error
	}
	a.setEnd(c.NotAfter)
	if left := time.Until(due(c)); left > 0 {
		return min(left, lookEvery), nil
	}
	next = min(askEvery, max(margin(c)/10, time.Second))
	issued, err := a.collect(ctx, c)
	if err != nil {
		return next, err
	}
	if err := files.Replace(path, issued); err != nil {
		return next, err
	}
	client, err := a.Client()
	if err != nil {
		return next, err
	}
	client.Reconnect()
	log.Info("the client certificate for the cluster store is renewed")
	return next, nil
}

func (a *Access) setEnd(t time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state.NotAfter = t
}

// collect returns the certificate that an administrator has approved, or makes the
// request.
func (a *Access) collect(ctx context.Context, present *x509.Certificate) ([]byte, error) {
	if time.Now().After(present.NotAfter) {
		return nil, errors.New("it has ended; run kleidi cluster setup --kubeconfig FILE on this node")
	}
	if err := a.check(present); err != nil {
		return nil, fmt.Errorf("%w; kleidi renews its own certificates only", err)
	}
	client, err := a.Client()
	if err != nil {
		return nil, err
	}
	r, err := a.pending(ctx, client)
	if err != nil {
		return nil, err
	}
	switch {
	case r == nil:
		pair, err := a.Certificate(ctx)
		if err != nil {
			return nil, err
		}
		if err := a.ask(ctx, client, pair.PrivateKey.(crypto.Signer)); err != nil { // CertificateFor's key, always a crypto.Signer
			return nil, err
		}
	case !a.isFor(r, present.PublicKey):
		return nil, fmt.Errorf("certificate request %s is not for this node's key; run kleidi cluster setup --kubeconfig FILE on this node", a.requestName())
	case r.refused() != nil:
		return nil, r.refused()
	case len(r.Status.Certificate) > 0:
		if err := a.checkIssued(r.Status.Certificate, present.PublicKey); err != nil {
			return nil, err
		}
		if c, err := parseLeaf(r.Status.Certificate); err == nil && c.NotAfter.After(present.NotAfter) {
			return r.Status.Certificate, nil
		}
		return nil, fmt.Errorf("certificate request %s is left from the last renewal; kube-controller-manager deletes it within the hour", a.requestName())
	}
	return nil, fmt.Errorf("certificate request %s waits for an administrator's approval; run kleidi cluster setup --kubeconfig FILE on this node, or check the request and approve it as docs/high-availability.md says", a.requestName())
}
