package grpcserver

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/beezy-dev/kleidi/grpcserver/internal/unixsocket"
)

// peerCredentials carries the peer that Accept found into gRPC.
type peerCredentials struct {
	callers Callers
}

// watchedConn is a connection whose end the callers learn.
type watchedConn struct {
	*unixsocket.Conn
	ended func()
}

// Close closes the connection.
func (c *watchedConn) Close() error {
	c.ended()
	return c.Conn.Close()
}

type authInfo struct {
	credentials.CommonAuthInfo
	peer    unixsocket.Peer
	allowed bool
	self    bool
}

// AuthType implements credentials.AuthInfo.
func (*authInfo) AuthType() string { return "SO_PEERCRED" }

var errNotOurListener = errors.New("the connection was not accepted by grpcserver.Listen, so its peer is unknown")

// ServerHandshake admits strangers too: a refused RPC can say why, a closed connection
// can't.
func (p peerCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*unixsocket.Conn)
	if !ok {
		return nil, nil, errNotOurListener
	}
	info := &authInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		peer:           c.Peer, allowed: c.Allowed, self: c.Self,
	}
	return &watchedConn{c, func() { p.callers.Ended(info) }}, info, nil
}

// ClientHandshake refuses: these are a server's credentials.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers")
}

// Info implements credentials.TransportCredentials.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "SO_PEERCRED"}
}

// Clone implements credentials.TransportCredentials.
func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

// OverrideServerName implements credentials.TransportCredentials.
func (peerCredentials) OverrideServerName(string) error { return nil }

// checkPeer returns the connection of a call. It answers PermissionDenied to peers that are
// not allowed.
func checkPeer(ctx context.Context) (*authInfo, error) {
	p, _ := peer.FromContext(ctx)
	if p == nil {
		return nil, status.Error(codes.PermissionDenied, errNotOurListener.Error())
	}
	a, ok := p.AuthInfo.(*authInfo)
	switch {
	case !ok:
		return nil, status.Error(codes.PermissionDenied, errNotOurListener.Error())
	case a.allowed:
		return a, nil
	case overflow(a.peer.UID):
		return nil, status.Errorf(codes.PermissionDenied, "UID %d may not use this socket: it is the overflow UID, which every user has that a user namespace does not map; "+
			"run kube-apiserver under a mapped user, or list %[1]d in kms.allowedUIDs, which admits all of them", a.peer.UID)
	}
	return nil, status.Errorf(codes.PermissionDenied, "UID %d may not use this socket; if kube-apiserver runs as that user, add %[1]d to kms.allowedUIDs", a.peer.UID)
}
