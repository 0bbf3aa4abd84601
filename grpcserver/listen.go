package grpcserver

import (
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/internal/unixsocket"
)

// Owner is the user and group that own a socket.
type Owner = unixsocket.Owner

// MaxSocketPath bounds ListenConfig.Path, in bytes.
const MaxSocketPath = unixsocket.MaxPath

// ListenConfig says where the KMS socket is and who may use it.
type ListenConfig struct {
	// Path is the socket's absolute path (kms.socket), at most MaxSocketPath bytes.
	Path string
	// Mode holds the permission bits; 0 means 0600.
	Mode fs.FileMode
	// Owner is nil for the process's own user and group.
	Owner *Owner
	// AllowedUIDs are the users whose processes may call (kms.allowedUIDs). Nil
	// means root and the socket's owner, but not the overflow UID (65534): in a
	// user namespace every unmapped user has it, so it must be listed.
	AllowedUIDs []uint32
	// Self admits this process whatever its user, for Ping.
	Self bool
	// Log receives a line when connections are turned away; nil discards it.
	Log *slog.Logger
}

// Listen makes the KMS socket, with its mode and owner, in a folder that it checks
// first. It replaces a stale socket. It refuses a socket that answers, any other kind
// of file, and an abstract socket. Closing the listener removes the socket, if it is
// still the same.
func Listen(cfg ListenConfig) (net.Listener, error) {
	if cfg.Mode == 0 {
		cfg.Mode = 0o600
	}
	l, err := unixsocket.Listen(unixsocket.Config{
		Path: cfg.Path, Setting: "kms.socket", Mode: cfg.Mode, Owner: cfg.Owner,
		AllowedUIDs: allowedUIDs(cfg), Self: cfg.Self, Log: cfg.Log,
	})
	if err != nil {
		return nil, err // not a typed nil
	}
	return l, nil
}

// CheckSocket verifies the folder of the KMS socket, as Listen does, before
// kube-apiserver is told to connect there. It does not ask who listens. A missing
// folder is not an error.
func CheckSocket(path string) error { return unixsocket.CheckFolder(path, "kms.socket") }

func allowedUIDs(cfg ListenConfig) []uint32 {
	if cfg.AllowedUIDs != nil {
		return cfg.AllowedUIDs
	}
	owner := uint32(os.Geteuid())
	if cfg.Owner != nil && cfg.Owner.UID >= 0 {
		owner = uint32(cfg.Owner.UID)
	}
	uids := []uint32{0}
	if owner != 0 && !overflow(owner) {
		uids = append(uids, owner)
	}
	return uids
}

// overflow reports whether uid is the running kernel's overflow UID or the usual one.
func overflow(uid uint32) bool {
	return slices.Contains([]uint32{unixsocket.OverflowUID(), 65534}, uid)
}
