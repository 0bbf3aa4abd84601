package grpcserver

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/tap"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/grpcserver/internal/panics"
	"github.com/beezy-dev/kleidi/seal"
)

// Bounds of a connection.
const (
	// maxMessage bounds a request and a response, in bytes. It is larger than the sum
	// of the fields' bounds, so that a refusal can name the field that is too long.
	maxMessage = 64 << 10
	maxHeaders = 16 << 10 // bytes
	maxStreams = 256      // calls at the same time on one connection
	// requestTimeout bounds one call, even of a client that sets no deadline and never
	// sends its body. kube-apiserver's own timeout is 3 s by default.
	requestTimeout = 10 * time.Second
	// connectTimeout bounds the time until a connection speaks HTTP/2.
	connectTimeout = 5 * time.Second
	// A client that stopped answering is noticed after pingAfter + pingWait.
	pingAfter = 30 * time.Second
	pingWait  = 10 * time.Second
	// minPing is the shortest time between two pings of a client.
	minPing = 10 * time.Second
	// maxIdle is well above a minute, the interval at which kube-apiserver polls
	// Status.
	maxIdle = 15 * time.Minute
)

// Options are all optional.
type Options struct {
	// Registerer takes the metrics kleidi_kms_….
	Registerer prometheus.Registerer
	// Log receives panics (type and place, never the value) and internal errors.
	Log *slog.Logger
	// Callers is told what each connection learns of the key ID.
	Callers Callers
}

// Server is the KMS v2 service.
type Server struct {
	keys    Keys
	callers Callers
	log     *slog.Logger
	grpc    *grpc.Server
}

// New makes a Server. It fails only if the metrics can't be registered.
func New(keys Keys, opt Options) (*Server, error) {
	m, err := newMetrics(opt.Registerer)
	if err != nil {
		return nil, fmt.Errorf("register KMS metrics: %w", err)
	}
	s := &Server{keys: keys, callers: opt.Callers, log: opt.Log}
	if s.callers == nil {
		s.callers = noCallers{}
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	options := append(TransportOptions(), grpc.Creds(peerCredentials{s.callers}))
	s.grpc = grpc.NewServer(append(options, pace()...)...)
	s.grpc.RegisterService(&grpc.ServiceDesc{
		ServiceName: kmsapi.KeyManagementService_ServiceDesc.ServiceName,
		Metadata:    kmsapi.KeyManagementService_ServiceDesc.Metadata,
		Methods: []grpc.MethodDesc{
			{MethodName: "Status", Handler: handler(s, "Status", m, s.status)},
			{MethodName: "Encrypt", Handler: handler(s, "Encrypt", m, s.encrypt)},
			{MethodName: "Decrypt", Handler: handler(s, "Decrypt", m, s.decrypt)},
		},
	}, nil)
	return s, nil
}

// TransportOptions are the server's limits. They are public so that a benchmark can
// measure a plugin without work on the same stack.
func TransportOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(peerCredentials{noCallers{}}),
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2("proto")}),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.InTapHandle(limitTime),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: maxIdle, Time: pingAfter, Timeout: pingWait,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: minPing, PermitWithoutStream: true,
		}),
	}
}

// streamWorkers is the number of goroutines that wait for calls. The stack of such a
// goroutine has already grown; gRPC starts another goroutine if all are busy.
// kube-apiserver makes fewer than 64 calls at the same time when it starts and decrypts
// the stored seeds.
const streamWorkers = 64

// bufferSize is the size of the read buffer and of the write buffer of each connection,
// in bytes. A call and its answer fit; gRPC's 32 KiB are meant for large messages.
const bufferSize = 4 << 10

// pace makes the server answer many callers faster, and use less memory for many
// connections, than gRPC does by default. "make bench" compares both.
func pace() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.NumStreamWorkers(streamWorkers), grpc.ReadBufferSize(bufferSize), grpc.WriteBufferSize(bufferSize)}
}

// limitTime bounds calls with no deadline or with a distant one. It runs before the
// body is read.
func limitTime(ctx context.Context, _ *tap.Info) (context.Context, error) {
	if d, ok := ctx.Deadline(); ok && time.Until(d) <= requestTimeout {
		return ctx, nil
	}
	limited, cancel := context.WithTimeout(ctx, requestTimeout)
	context.AfterFunc(ctx, cancel) // gRPC cancels ctx when the call ends
	return limited, nil
}

// handler wraps every call: it checks the peer, decodes the request, makes the call,
// turns a panic into an error, and counts the answer.
func handler[Req, Resp any](s *Server, name string, m *metrics, call func(*Req) (*Resp, error)) grpc.MethodHandler {
	mm := m.method(name)
	return func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (resp any, err error) {
		start := time.Now()
		defer func() {
			if v := recover(); v != nil {
				panics.Log(s.log, name, v)
				resp, err = nil, errPanic
			}
			mm.observe(time.Since(start), err)
		}()
		conn, err := checkPeer(ctx)
		if err != nil {
			return nil, err
		}
		var in request[Req]
		if err := decode(&in); err != nil {
			return nil, err // the message did not arrive, or not in time
		}
		if in.err != nil {
			return nil, errDecode
		}
		answer, err := call(&in.message)
		if err != nil {
			return nil, err
		}
		if conn.self { // the watchdog's ping, not a kube-apiserver
			return answer, nil
		}
		switch a := any(answer).(type) {
		case *kmsapi.StatusResponse:
			s.callers.Answered(conn, seal.KeyID(a.KeyId), false)
		case *kmsapi.EncryptResponse:
			s.callers.Answered(conn, seal.KeyID(a.KeyId), true)
		}
		return answer, nil
	}
}

// Serve answers on a listener of [Listen] until it is stopped. Stopping is not an error.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(l) }

// GracefulStop closes the listener, lets calls in progress end, and cuts them off
// when ctx is done.
func (s *Server) GracefulStop(ctx context.Context) {
	stop := context.AfterFunc(ctx, s.grpc.Stop)
	defer stop()
	s.grpc.GracefulStop()
}
