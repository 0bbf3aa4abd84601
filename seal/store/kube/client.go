package kube

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/transport"
	"k8s.io/client-go/util/connrotation"
)

const (
	// callTimeout bounds one request, except a watch.
	callTimeout = 10 * time.Second
	// maxAnswer bounds the answer to one request, in bytes. The largest is an object
	// with a keyring of [store.MaxSize] in base64, with kube-apiserver's own fields.
	maxAnswer = 3 << 20
)

// Options say how to reach the API.
type Options struct {
	// Kubeconfig is the path of a kubeconfig file, which is read at each connection.
	Kubeconfig string
	// Certificate, if set, returns the client certificate that replaces the
	// kubeconfig's. It is called for each connection.
	Certificate func() (*tls.Certificate, error)
	// Wrap, if set, wraps the transport, for tests.
	Wrap func(http.RoundTripper) http.RoundTripper
}

// Client calls the API of a cluster.
type Client struct {
	base string // URL without a slash at its end
	http *http.Client
	// dialer, if there is one, can close the connections, so that the next one is made
	// with the certificate of that time.
	dialer *connrotation.Dialer
}

// NewClient reads the kubeconfig. It does not connect.
func NewClient(o Options) (*Client, error) {
	c, err := load(o.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", o.Kubeconfig, err)
	}
	switch {
	case c.ExecProvider != nil || c.AuthProvider != nil:
		return nil, fmt.Errorf("kubeconfig %s: its user runs a command or a plugin to log in; kleidi runs none: use a client certificate or a token file", o.Kubeconfig)
	case c.Insecure:
		return nil, fmt.Errorf("kubeconfig %s: insecure-skip-tls-verify is set; name the API's certificate authority instead", o.Kubeconfig)
	}
	base, _, err := rest.DefaultServerUrlFor(c)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", o.Kubeconfig, err)
	}
	tc, err := c.TransportConfig()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", o.Kubeconfig, err)
	}
	client := &Client{base: strings.TrimSuffix(base.String(), "/")}
	if o.Certificate != nil {
		client.dialer = connrotation.NewDialer((&net.Dialer{Timeout: callTimeout, KeepAlive: 30 * time.Second}).DialContext)
		tc.DialHolder = &transport.DialHolder{Dial: client.dialer.DialContext}
		tc.TLS.CertData, tc.TLS.KeyData, tc.TLS.CertFile, tc.TLS.KeyFile = nil, nil, "", ""
		tc.TLS.GetCertHolder = &transport.GetCertHolder{GetCert: o.Certificate}
	}
	rt, err := transport.New(tc)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", o.Kubeconfig, err)
	}
	if o.Wrap != nil {
		rt = o.Wrap(rt)
	}
	client.http = &http.Client{Transport: rt}
	return client, nil
}

// Reconnect closes all connections, so that the next call presents the present client
// certificate.
func (c *Client) Reconnect() {
	if c.dialer != nil {
		c.dialer.CloseAll()
	}
}

// Host returns the host and port of the API.
func (c *Client) Host() string {
	u, err := url.Parse(c.base)
	if err != nil {
		return ""
	}
	if u.Port() == "" {
		return u.Host + ":443"
	}
	return u.Host
}

// Refusal is an answer of the API other than success.
type Refusal struct {
	Code int
	// Reason is a word of the API's vocabulary: NotFound, Conflict. It is empty if the
	// answer does not come from an API that knows the resource.
	Reason  string `json:"reason"`
	Message string `json:"message"`
	// Continue continues a list whose revision is gone, at a newer revision.
	Continue string `json:"-"`
}

// Error quotes the API's answer.
func (r *Refusal) Error() string { return fmt.Sprintf("the API answers %d: %.300s", r.Code, r.Message) }

// Refused reports whether err is the API's answer with this code.
func Refused(err error, code int) bool {
	r, ok := errors.AsType[*Refusal](err)
	return ok && r.Code == code
}

// certain reports whether the API has refused a request without doing anything: a
// fault of the client, not of the server.
func certain(err error) bool {
	r, ok := errors.AsType[*Refusal](err)
	return ok && r.Code/100 == 4 && r.Code != http.StatusRequestTimeout
}

// ErrTooLarge says that an answer is larger than this client reads.
var ErrTooLarge = fmt.Errorf("the API's answer has more than %d bytes", maxAnswer)

// Do sends in and reads the answer into out. Either may be nil.
func (c *Client) Do(ctx context.Context, method, path, contentType string, in, out any) error {
	return c.do(ctx, method, path, contentType, JSON, in, out)
}

// Metadata reads only the metadata of the objects of a list.
func (c *Client) Metadata(ctx context.Context, path string, out any) error {
	return c.do(ctx, http.MethodGet, path, "", JSON+";as=PartialObjectMetadataList;g=meta.k8s.io;v=v1", nil, out)
}

// Rewrite makes the API write an object unchanged, by an empty patch. The answer holds only
// the object's metadata: a Secret's values don't leave the API.
func (c *Client) Rewrite(ctx context.Context, path string) error {
	return c.do(ctx, http.MethodPatch, path, MergePatch, JSON+";as=PartialObjectMetadata;g=meta.k8s.io;v=v1", struct{}{}, nil)
}

func (c *Client) do(ctx context.Context, method, path, contentType, accept string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
	}
	res, err := c.send(ctx, method, path, contentType, accept, body)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	switch {
	case err != nil:
		return err
	case len(answer) > maxAnswer:
		return ErrTooLarge
	case res.StatusCode/100 != 2:
		if res.StatusCode == http.StatusUnauthorized {
			c.Reconnect() // the certificate of this connection may have expired
		}
		return refusal(res.StatusCode, answer)
	case out == nil:
		return nil
	}
	return json.Unmarshal(answer, out)
}

// Lines calls line for each line of an answer in text, which may be long.
func (c *Client) Lines(ctx context.Context, path string, line func(string)) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := c.send(ctx, http.MethodGet, path, "", "text/plain", nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
		return cmp.Or(err, refusal(res.StatusCode, b))
	}
	s := bufio.NewScanner(res.Body)
	for s.Scan() {
		line(s.Text())
	}
	return s.Err()
}

func refusal(code int, answer []byte) error {
	r := &Refusal{}
	var status struct {
		Metadata struct {
			Continue string `json:"continue"`
		} `json:"metadata"`
	}
	if json.Unmarshal(answer, &status) == nil {
		r.Continue = status.Metadata.Continue
	}
	if json.Unmarshal(answer, r) != nil || r.Message == "" {
		r.Reason, r.Message = "", strings.TrimSpace(string(answer[:min(len(answer), 200)]))
	}
	r.Code = code
	return r
}

func (c *Client) send(ctx context.Context, method, path, contentType, accept string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body == nil {
		req.Body, req.ContentLength = http.NoBody, 0
	} else {
		req.Header.Set("Content-Type", contentType)
	}
	req.Header.Set("Accept", accept)
	res, err := c.http.Do(req)
	// The transport may still hand out a connection that Reconnect has closed. A read is
	// safe to repeat; a write may have arrived.
	if method == http.MethodGet && errors.Is(err, net.ErrClosed) && ctx.Err() == nil {
		return c.http.Do(req)
	}
	return res, err
}

// Content types of requests.
const (
	JSON       = "application/json"
	JSONPatch  = "application/json-patch+json"
	MergePatch = "application/merge-patch+json"
	ApplyPatch = "application/apply-patch+yaml"
)
