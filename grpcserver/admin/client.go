package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"

	"github.com/beezy-dev/kleidi/grpcserver/internal/unixsocket"
	"github.com/beezy-dev/kleidi/seal"
)

// ErrNotRunning says that nothing answers on the admin socket.
var ErrNotRunning = errors.New("kleidi serve does not run")

// maxResponse bounds an answer, in bytes.
const maxResponse = 4 << 20

// Client calls a running serve.
type Client struct {
	path string
	http *http.Client
}

// Dial connects to the admin socket. It returns [ErrNotRunning] if there is no socket or
// if nothing answers on it. After any other error the caller can't tell whether serve
// runs. Before each request Dial asks the kernel who listens, because a request may hold
// the recovery identity. The request goes only to a serve that runs as root or as this
// process's own user.
func Dial(ctx context.Context, path string) (*Client, error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return unixsocket.Dial(ctx, path, "kleidi serve")
	}
	conn, err := dial(ctx, "", "")
	if err != nil {
		return nil, dialError(path, err)
	}
	conn.Close()
	return &Client{path: path, http: &http.Client{
		Timeout: opTimeout + 2*readTimeout, // the server's own limit comes first, with a better explanation
		Transport: &http.Transport{
			DialContext: dial, DisableCompression: true, DisableKeepAlives: true,
			MaxResponseHeaderBytes: maxHeaders,
		},
	}}, nil
}

func dialError(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: nothing answers on %s", ErrNotRunning, path)
	case errors.Is(err, fs.ErrPermission):
		return seal.WithHint(fmt.Errorf("you may not connect to %s (admin.socket)", path), "run the command as root, or as the user of kleidi serve")
	}
	return fmt.Errorf("admin.socket: %w", err)
}

// Call runs verb on the running serve. An error of the operation arrives as on the
// server: a [*seal.Error] with its cause and hint, if it was one.
func Call[Req, Resp any](ctx context.Context, c *Client, verb Verb[Req, Resp], req Req) (Resp, error) {
	var resp Resp
	body, err := json.Marshal(req)
	if err != nil {
		return resp, err
	}
	defer clear(body)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://kleidi"+prefix+string(verb), bytes.NewReader(body))
	if err != nil {
		return resp, err
	}
	r.Header.Set("Content-Type", "application/json")
	answer, err := c.http.Do(r)
	if err != nil {
		return resp, fmt.Errorf("ask kleidi serve on %s: %w; see its log for whether %s was done", c.path, err, verb)
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(io.LimitReader(answer.Body, maxResponse+1))
	if err != nil || len(b) > maxResponse {
		return resp, fmt.Errorf("the answer of kleidi serve is cut short or too long (%w)", errors.Join(err, io.ErrUnexpectedEOF))
	}
	if answer.StatusCode != http.StatusOK {
		var p Problem
		if err := json.Unmarshal(b, &p); err != nil || p.Message == "" {
			return resp, fmt.Errorf("kleidi serve answers %s", answer.Status)
		}
		return resp, p.Err()
	}
	if err := json.Unmarshal(b, &resp); err != nil {
		return resp, fmt.Errorf("the answer of kleidi serve: %w", err)
	}
	return resp, nil
}
