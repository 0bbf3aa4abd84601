package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	kjson "sigs.k8s.io/json"

	"github.com/beezy-dev/kleidi/grpcserver/internal/panics"
	"github.com/beezy-dev/kleidi/grpcserver/internal/unixsocket"
	"github.com/beezy-dev/kleidi/seal"
)

// Bounds of a request.
const (
	maxRequest = 2 << 20  // bytes; a keyring of 1 MiB, in base64, fits
	maxHeaders = 16 << 10 // bytes
	// opTimeout bounds one operation. A discrete TPM takes seconds, and may have to retry.
	opTimeout = 2 * time.Minute
	// readTimeout bounds the arrival of a request.
	readTimeout = 10 * time.Second
	idleTimeout = time.Minute
)

// prefix versions the paths, so that a CLI of another version is not misunderstood.
const prefix = "/v1/"

// Options are all optional.
type Options struct {
	// Log receives each operation with its outcome, never a request.
	Log *slog.Logger
}

// Server answers verbs. Register them with [Handle] before [Server.Serve].
type Server struct {
	mux  *http.ServeMux
	http *http.Server
	log  *slog.Logger
}

// Listen makes the admin socket: 0600, usable only by root and by this process's own
// user. The rules of grpcserver.Listen apply to the folder and to an existing socket.
func Listen(path string, log *slog.Logger) (net.Listener, error) {
	l, err := unixsocket.Listen(unixsocket.Config{
		Path: path, Setting: "admin.socket", Mode: 0o600, Log: log,
		AllowedUIDs: slices.Compact([]uint32{0, uint32(os.Geteuid())}),
	})
	if err != nil {
		return nil, err // not a typed nil
	}
	return listener{l}, nil
}

// NewServer returns a Server without verbs.
func NewServer(opt Options) *Server {
	s := &Server{mux: http.NewServeMux(), log: opt.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.http = &http.Server{
		Handler:           http.HandlerFunc(s.gate),
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      opTimeout + readTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaders,
		ErrorLog:          log.New(io.Discard, "", 0), // it would contain the value of a handler's panic
		ConnContext:       rememberPeer,
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		respond(w, http.StatusNotFound, &Problem{
			Message: fmt.Sprintf("the running kleidi serve does not know %.100q", strings.TrimPrefix(r.URL.Path, prefix)),
			Hint:    "its version is not that of this command: restart it (systemctl restart kleidi)",
		})
	})
	return s
}

type peerKey struct{}

func rememberPeer(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, c)
}

// gate refuses peers before it reads more than the headers.
func (s *Server) gate(w http.ResponseWriter, r *http.Request) {
	c, ok := r.Context().Value(peerKey{}).(*conn)
	switch {
	case !ok:
		w.Header().Set("Connection", "close")
		respond(w, http.StatusForbidden, &Problem{Message: "the connection was not accepted by admin.Listen, so its peer is unknown"})
	case !c.Allowed:
		w.Header().Set("Connection", "close")
		s.log.Warn("admin socket: peer refused", "uid", c.Peer.UID, "pid", c.Peer.PID)
		respond(w, http.StatusForbidden, &Problem{
			Message: fmt.Sprintf("UID %d may not use the admin socket", c.Peer.UID), Hint: "run the command as root",
		})
	default:
		s.mux.ServeHTTP(w, r)
	}
}

// Serve answers on a listener of [Listen] until Shutdown. Stopping is not an error.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Shutdown closes the listener and waits for operations in progress, or for ctx.
func (s *Server) Shutdown(ctx context.Context) error {
	if err := s.http.Shutdown(ctx); err != nil {
		return errors.Join(err, s.http.Close())
	}
	return nil
}

// wiper is a request that holds a secret.
type wiper interface{ Wipe() }

// Handle lets s answer verb with f. The context of f ends after two minutes, or when
// the client goes away. Handle wipes a request that has a Wipe method when f returns.
func Handle[Req, Resp any](s *Server, verb Verb[Req, Resp], f func(context.Context, Req) (Resp, error)) {
	s.mux.HandleFunc("POST "+prefix+string(verb), func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		resp, err := serve(s, verb, f, w, r)
		if err != nil {
			s.log.Warn("admin operation failed", "verb", string(verb), "error", err, "duration", time.Since(start))
			respond(w, statusOf(err), ProblemOf(err))
			return
		}
		s.log.Debug("admin operation done", "verb", string(verb), "duration", time.Since(start))
		respond(w, http.StatusOK, resp)
	})
}

func serve[Req, Resp any](s *Server, verb Verb[Req, Resp], f func(context.Context, Req) (Resp, error), w http.ResponseWriter, r *http.Request) (resp Resp, err error) {
	defer func() {
		if v := recover(); v != nil {
			panics.Log(s.log, string(verb), v)
			err = errPanic
		}
	}()
	ctx, cancel := context.WithTimeout(r.Context(), opTimeout)
	defer cancel()
	var req Req
	if secret, ok := any(&req).(wiper); ok {
		w.Header().Set("Connection", "close") // see conn.wipe
		defer secret.Wipe()
		if c, ok := r.Context().Value(peerKey{}).(*conn); ok {
			defer c.wipe()
		}
	}
	if err := decode(r.Body, &req); err != nil {
		return resp, err
	}
	return f(ctx, req)
}

var errPanic = errors.New("internal error in kleidi; see the log of kleidi serve for the place, and report it")

// badRequest is a request that does not parse.
type badRequest struct{ error }

func statusOf(err error) int {
	if _, ok := errors.AsType[badRequest](err); ok {
		return http.StatusBadRequest
	}
	if errors.Is(err, errPanic) {
		return http.StatusInternalServerError
	}
	return http.StatusUnprocessableEntity
}

// decode reads one JSON object, strictly: an unknown field may be a condition, which
// this version must not ignore. Errors quote no value.
func decode(body io.Reader, v any) error {
	b := make([]byte, 0, 4<<10)
	defer func() { clear(b[:cap(b)]) }()
	b, err := readAll(b, body)
	if err != nil {
		return badRequest{err}
	}
	var strict []error
	seal.Erase(func() { strict, err = kjson.UnmarshalStrict(b, v) })
	if err != nil {
		return badRequest{errors.New("the request is not valid JSON for this command; are kleidi and kleidi serve the same version?")}
	}
	if len(strict) > 0 {
		return badRequest{fmt.Errorf("the request: %w; are kleidi and kleidi serve the same version?", errors.Join(strict...))}
	}
	return nil
}

// readAll appends the content of r to b, at most maxRequest bytes. If a buffer is too
// small, readAll clears it before it takes a larger one.
func readAll(b []byte, r io.Reader) ([]byte, error) {
	for {
		if len(b) == cap(b) {
			if len(b) >= maxRequest {
				return b, fmt.Errorf("the request is larger than %d bytes", maxRequest)
			}
			bigger := append(make([]byte, 0, 2*cap(b)), b...)
			clear(b)
			b = bigger
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if errors.Is(err, io.EOF) {
			return b, nil
		}
		if err != nil {
			return b, fmt.Errorf("read the request: %w", err)
		}
	}
}

func respond(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // fails if the client went away
}
