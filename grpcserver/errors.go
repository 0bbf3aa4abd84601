package grpcserver

import (
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/beezy-dev/kleidi/seal"
)

// Bounds of the parts of a status message, in runes. Reason and hint have separate
// bounds, so that a long reason never costs the hint.
const (
	maxReason = 600
	maxHint   = 300
	maxQuoted = 80
)

var (
	errPanic   = status.Error(codes.Internal, "internal error in kleidi; see the log of kleidi serve for the place, and report it")
	errDecode  = status.Error(codes.InvalidArgument, "the request is not a KMS v2 message; is the caller a kube-apiserver?")
	errAnnotes = status.Error(codes.InvalidArgument, "annotations: kleidi writes none; was the object encrypted by another KMS plugin, or by a newer kleidi?")
)

// statusOf turns an error of Keys into a gRPC status. id is the key ID in a Decrypt
// request. The second result reports whether to log the error too: only an error without
// a remedy for the caller is logged.
func statusOf(err error, id string) (error, bool) {
	switch {
	case errors.Is(err, seal.ErrUnknownKey):
		return status.Errorf(codes.NotFound, "key_id: no KEK of this keyring has key ID %q; "+
			"see kleidi keyring show, and restore the keyring that holds it", seal.OneLine(id, maxQuoted)), false
	case errors.Is(err, seal.ErrMalformed):
		return status.Error(codes.InvalidArgument, "ciphertext: not of a form that kleidi writes; was it written by another plugin, or cut short?"), false
	case errors.Is(err, seal.ErrAuthentication):
		return status.Errorf(codes.DataLoss, "ciphertext: does not authenticate under key ID %q, so it was changed after kleidi wrote it; "+
			"restore the object from a backup of etcd", seal.OneLine(id, maxQuoted)), false
	}
	if e, ok := errors.AsType[*seal.Error](err); ok {
		return status.Error(codes.Unavailable, locked(e.Cause, err)), false
	}
	return status.Error(codes.Internal, "internal error in kleidi; see the log of kleidi serve"), true
}

func locked(cause seal.Cause, err error) string {
	reason, hint := seal.SplitHint(err)
	msg := "locked (" + seal.OneLine(string(cause), maxQuoted) + "): " + seal.OneLine(reason, maxReason)
	if hint != "" {
		msg += "; " + seal.OneLine(hint, maxHint)
	}
	return msg
}
