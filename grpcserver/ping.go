package grpcserver

import (
	"context"
	"net"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"
	kmsapi "k8s.io/kms/apis/v2"
)

// Ping calls Status on a KMS socket, as kube-apiserver does. It returns nil once a server has
// answered: the answer that the keyring is locked, or that this user may not call, comes from
// a server that works.
func Ping(ctx context.Context, socket string) error {
	var server trailer
	conn, err := grpc.NewClient("passthrough:///"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"), grpc.WithStatsHandler(&server), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = kmsapi.NewKeyManagementServiceClient(conn).Status(ctx, &kmsapi.StatusRequest{})
	if server.answered.Load() {
		return nil
	}
	return err
}

// trailer tells an error that the server sent from one that the client made: both may have
// the code Unavailable.
type trailer struct{ answered atomic.Bool }

// TagRPC implements stats.Handler.
func (*trailer) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// HandleRPC implements stats.Handler.
func (a *trailer) HandleRPC(_ context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.InTrailer); ok {
		a.answered.Store(true)
	}
}

// TagConn implements stats.Handler.
func (*trailer) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (*trailer) HandleConn(context.Context, stats.ConnStats) {}
