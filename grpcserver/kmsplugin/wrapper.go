package kmsplugin

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/grpcserver/internal/unixsocket"
	"github.com/beezy-dev/kleidi/seal"
)

const (
	hintOtherKey = "see whether kmsPlugin.socket is the plugin that made the slot, and whether it still has that key"
)

// maxMessage bounds an answer of the plugin, in bytes.
const maxMessage = 64 << 10

// Config says which plugin wraps.
type Config struct {
	// Socket is the path of the plugin's unix socket.
	Socket string
	// Timeout bounds one operation, including the time to connect.
	Timeout time.Duration
	// Memory allocates KEKs.
	Memory seal.Memory
}

// Wrapper wraps KEKs with a KMS v2 plugin. It implements [seal.Wrapper].
type Wrapper struct{ config Config }

// New returns a Wrapper. It does not ask the plugin.
func New(c Config) (*Wrapper, error) {
	if !filepath.IsAbs(c.Socket) {
		return nil, fmt.Errorf("socket: %q; want the absolute path of the plugin's socket, without unix://", c.Socket)
	}
	if c.Timeout < time.Second || c.Timeout > time.Minute {
		return nil, fmt.Errorf("timeout: %v; want 1s to 1m", c.Timeout)
	}
	return &Wrapper{c}, nil
}

// Type returns seal.TypeKMSPlugin.
func (*Wrapper) Type() string { return seal.TypeKMSPlugin }

// Wrap asks the plugin to encrypt kek.
func (w *Wrapper) Wrap(ctx context.Context, kek *seal.Secret) (slot seal.Slot, err error) {
	var plain []byte
	defer func() { clear(plain) }()
	kek.With(func(b []byte) {
		if len(b) == seal.KEKSize {
			plain = append(make([]byte, 0, seal.KEKSize), b...)
		}
	})
	if plain == nil {
		return slot, errors.New("kms-plugin: no KEK to wrap: it is closed or has the wrong size")
	}
	defer seal.Collect() // buffers of gRPC
	err = w.call(ctx, func(ctx context.Context, c kmsapi.KeyManagementServiceClient) error {
		answer, err := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: plain, Uid: rand.Text()})
		if err != nil {
			return explain("Encrypt", err)
		}
		slot, err = slotOf(answer)
		return err
	})
	return slot, err
}

// WrapLike wraps kek as Wrap does. The error is seal.ErrNotMine unless like is a slot of
// this type.
func (w *Wrapper) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if _, err := parseSlot(like); err != nil {
		return seal.Slot{}, err
	}
	return w.Wrap(ctx, kek)
}

// Unwrap implements [seal.Wrapper].
func (w *Wrapper) Unwrap(ctx context.Context, slot seal.Slot) (kek *seal.Secret, err error) {
	d, err := parseSlot(slot)
	if err != nil {
		return nil, err
	}
	err = w.call(ctx, func(ctx context.Context, c kmsapi.KeyManagementServiceClient) error {
		answer, err := c.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: d.Ciphertext, KeyId: d.KeyID, Annotations: d.Annotations, Uid: rand.Text()})
		if err != nil {
			return explain("Decrypt", err)
		}
		defer clear(answer.Plaintext)
		if len(answer.Plaintext) != seal.KEKSize {
			return corrupt(errors.New("it holds no KEK"))
		}
		kek, err = w.config.Memory.Take(answer.Plaintext)
		return err
	})
	seal.Collect()
	return kek, err
}

// Check compares the plugin's present key ID with that of the slot. It returns a warning
// with a remedy if they differ, because the plugin may forget a former key.
func (w *Wrapper) Check(ctx context.Context, slot seal.Slot) (warnings []string, err error) {
	d, err := parseSlot(slot)
	if err != nil {
		return nil, err
	}
	err = w.call(ctx, func(ctx context.Context, c kmsapi.KeyManagementServiceClient) error {
		now, err := healthy(ctx, c)
		if err != nil {
			return err
		}
		if now != d.KeyID {
			warnings = []string{fmt.Sprintf("the plugin encrypts under key %s now, and the slot was made under %s; run kleidi slot rewrap NAME before the plugin forgets that key",
				seal.OneLine(now, 80), seal.OneLine(d.KeyID, 80))}
		}
		return nil
	})
	return warnings, err
}

// call runs f with a connection that ends with it.
func (w *Wrapper) call(ctx context.Context, f func(context.Context, kmsapi.KeyManagementServiceClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, w.config.Timeout)
	defer cancel()
	raw, err := unixsocket.Dial(ctx, w.config.Socket, "the KMS plugin")
	if err != nil {
		return dialError(err)
	}
	defer raw.Close()
	once := make(chan net.Conn, 1)
	once <- raw
	conn, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("the plugin closed the connection")
			}
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(ctx, kmsapi.NewKeyManagementServiceClient(conn))
}

func dialError(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, context.DeadlineExceeded):
		return seal.Errorf(seal.CauseUnavailable, hintPlugin, "kms-plugin: nothing answers: %w", err)
	case errors.Is(err, context.Canceled):
		return seal.Errorf(seal.CauseUnavailable, hintPlugin, "kms-plugin: %w", err)
	}
	return seal.AddHint(seal.Errorf(seal.CauseConfiguration, "", "kms-plugin: %w", err), hintPlugin)
}

// explain turns an error of the plugin into a [*seal.Error]. KMS v2 does not define which
// code means what, so only codes that speak of the request itself count against the slot.
// After any other code trying again may help.
func explain(method string, err error) error {
	said := seal.OneLine(status.Convert(err).Message(), 200)
	code := status.Code(err)
	if method == "Decrypt" && (code == codes.InvalidArgument || code == codes.NotFound || code == codes.FailedPrecondition) {
		return seal.Errorf(seal.CauseSlotCorrupt, hintOtherKey, "kms-plugin slot: the plugin can't decrypt it: %v: %q", code, said)
	}
	return seal.Errorf(seal.CauseUnavailable, hintPlugin, "kms-plugin: %s: %v: %q", method, code, said)
}

// healthy returns the key ID of a plugin that calls itself healthy.
func healthy(ctx context.Context, c kmsapi.KeyManagementServiceClient) (keyID string, err error) {
	s, err := c.Status(ctx, &kmsapi.StatusRequest{})
	switch {
	case err != nil:
		return "", explain("Status", err)
	case s.Version != "v2" && s.Version != "v2beta1":
		return "", seal.Errorf(seal.CauseConfiguration, "name the socket of a KMS v2 plugin in kmsPlugin.socket", "kms-plugin: it speaks version %q, want v2", seal.OneLine(s.Version, 40))
	case s.Healthz != "ok":
		return "", seal.Errorf(seal.CauseUnavailable, hintPlugin, "kms-plugin: it is not healthy: %q", seal.OneLine(s.Healthz, 200))
	case s.KeyId == "" || len(s.KeyId) > maxKeyID:
		return "", seal.Errorf(seal.CauseUnavailable, hintPlugin, "kms-plugin: it names a key ID of %d bytes, want 1 to %d", len(s.KeyId), maxKeyID)
	}
	return s.KeyId, nil
}
