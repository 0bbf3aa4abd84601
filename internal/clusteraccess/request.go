package clusteraccess

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/beezy-dev/kleidi/deploy/cluster"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

const (
	requests = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
	signer   = "kubernetes.io/kube-apiserver-client"
	// signedWithin bounds how long kube-controller-manager takes to sign an approved
	// request.
	signedWithin = time.Minute
)

// signingRequest is a CertificateSigningRequest.
type signingRequest struct {
	APIVersion string         `json:"apiVersion"`
	Kind       string         `json:"kind"`
	Metadata   map[string]any `json:"metadata"`
	Spec       struct {
		Request    []byte   `json:"request"`
		SignerName string   `json:"signerName"`
		Usages     []string `json:"usages"`
	} `json:"spec"`
	Status struct {
		Conditions  []condition `json:"conditions,omitempty"`
		Certificate []byte      `json:"certificate,omitempty"`
	} `json:"status"`
}

type condition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// is returns the condition of a type, if it holds.
func (r *signingRequest) is(kind string) *condition {
	for i, c := range r.Status.Conditions {
		if c.Type == kind {
			return &r.Status.Conditions[i]
		}
	}
	return nil
}

// refused returns why a request gets no certificate.
func (r *signingRequest) refused() error {
	for _, kind := range []string{"Denied", "Failed"} {
		if c := r.is(kind); c != nil {
			return fmt.Errorf("certificate request %s: %s: %s", r.Metadata["name"], kind, c.Message)
		}
	}
	return nil
}

// requestPath returns the path of the node's request. Its name is fixed, so that the
// node's role can name it.
func (a *Access) requestPath() string { return requests + "/" + url.PathEscape(a.requestName()) }

func (a *Access) requestName() string { return cluster.RequestName(a.Node) }

// ask makes the node's request.
func (a *Access) ask(ctx context.Context, c *kube.Client, s crypto.Signer) error {
	pemRequest, err := a.request(s)
	if err != nil {
		return err
	}
	r := signingRequest{APIVersion: "certificates.k8s.io/v1", Kind: "CertificateSigningRequest", Metadata: map[string]any{"name": a.requestName()}}
	r.Spec.Request, r.Spec.SignerName, r.Spec.Usages = pemRequest, signer, []string{"digital signature", "client auth"}
	if err := c.Do(ctx, http.MethodPost, requests, kube.JSON, r, nil); err != nil {
		return fmt.Errorf("make certificate request %s: %w", a.requestName(), err)
	}
	return nil
}

// pending reads the node's request. It is nil if there is none.
func (a *Access) pending(ctx context.Context, c *kube.Client) (*signingRequest, error) {
	r := &signingRequest{}
	err := c.Do(ctx, http.MethodGet, a.requestPath(), "", nil, r)
	if kube.Refused(err, http.StatusNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read certificate request %s: %w", a.requestName(), err)
	}
	return r, nil
}

// obtain makes a request with an administrator's client, approves it, and waits for the
// certificate. It deletes any earlier request of that name, so that it approves only a
// request that this process has just made.
func (a *Access) obtain(ctx context.Context, admin *kube.Client, s crypto.Signer) ([]byte, error) {
	err := admin.Do(ctx, http.MethodDelete, a.requestPath(), "", nil, nil)
	if err != nil && !kube.Refused(err, http.StatusNotFound) {
		return nil, fmt.Errorf("delete the earlier certificate request %s: %w", a.requestName(), err)
	}
	if err := a.ask(ctx, admin, s); err != nil {
		return nil, err
	}
	r, err := a.pending(ctx, admin)
	if err != nil {
		return nil, err
	}
	if r == nil || !a.isFor(r, s.Public()) {
		return nil, fmt.Errorf("certificate request %s was replaced meanwhile; nothing was approved", a.requestName())
	}
	r.Status.Conditions = append(r.Status.Conditions, condition{"Approved", "True", "KleidiClusterSetup", "approved by kleidi cluster setup on the node"})
	if err := admin.Do(ctx, http.MethodPut, a.requestPath()+"/approval", kube.JSON, r, nil); err != nil {
		return nil, fmt.Errorf("approve certificate request %s: %w", a.requestName(), err)
	}
	return a.await(ctx, admin, s.Public())
}

// await waits until an approved request is signed.
func (a *Access) await(ctx context.Context, c *kube.Client, key crypto.PublicKey) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, signedWithin)
	defer cancel()
	for {
		r, err := a.pending(ctx, c)
		switch {
		case ctx.Err() != nil:
			return nil, fmt.Errorf("certificate request %s is approved, but no certificate came within %s; see whether kube-controller-manager runs, and has --cluster-signing-cert-file and --cluster-signing-key-file, then run the command again", a.requestName(), signedWithin)
		case err != nil:
			return nil, err
		case r == nil:
			return nil, fmt.Errorf("certificate request %s is gone", a.requestName())
		case len(r.Status.Certificate) > 0:
			return r.Status.Certificate, a.checkIssued(r.Status.Certificate, key)
		}
		if err := r.refused(); err != nil {
			return nil, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// isFor reports whether a request is by this key, for the node's user alone.
func (a *Access) isFor(r *signingRequest, key crypto.PublicKey) bool {
	block, _ := pem.Decode(r.Spec.Request)
	if block == nil || r.Spec.SignerName != signer {
		return false
	}
	q, err := x509.ParseCertificateRequest(block.Bytes)
	return err == nil && q.CheckSignature() == nil && sameKey(q.PublicKey, key) &&
		q.Subject.CommonName == a.User() && len(q.Subject.Organization) == 0
}

func sameKey(a, b crypto.PublicKey) bool {
	x, err := x509.MarshalPKIXPublicKey(a)
	if err != nil {
		return false
	}
	y, err := x509.MarshalPKIXPublicKey(b)
	return err == nil && bytes.Equal(x, y)
}

// checkIssued refuses a certificate that is not for this key, or not for this node alone.
func (a *Access) checkIssued(b []byte, key crypto.PublicKey) error {
	if len(b) > files.MaxCertificates {
		return fmt.Errorf("the API's certificate has more than %d bytes", files.MaxCertificates)
	}
	c, err := parseLeaf(b)
	if err != nil {
		return fmt.Errorf("the API's certificate: %w", err)
	}
	if !sameKey(c.PublicKey, key) {
		return errors.New("the API returns a certificate for another key")
	}
	if err := a.check(c); err != nil {
		return fmt.Errorf("the API's certificate: %w", err)
	}
	return nil
}
