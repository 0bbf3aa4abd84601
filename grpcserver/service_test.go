package grpcserver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/seal"
)

func TestRoundTrip(t *testing.T) {
	r := start(t, newKeys(t, "k1-old", "k1-new"), grpcserver.ListenConfig{})
	c, ctx := r.client(t), limited(t)
	st, err := c.Status(ctx, &kmsapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if st.Version != "v2" || st.Healthz != "ok" || st.KeyId != "k1-new" {
		t.Errorf("status: %v", st)
	}
	for _, n := range []int{1, 32, grpcserver.MaxPlaintext} {
		plain := bytes.Repeat([]byte{0xa5}, n)
		enc, err := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: plain, Uid: "u"})
		if err != nil {
			t.Fatal(err)
		}
		if enc.KeyId != st.KeyId || len(enc.Ciphertext) > 1024 || len(enc.Annotations) != 0 {
			t.Errorf("%d bytes: %d bytes of ciphertext under %q", n, len(enc.Ciphertext), enc.KeyId)
		}
		dec, err := c.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: enc.Ciphertext, KeyId: enc.KeyId, Uid: "u"})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(dec.Plaintext, plain) {
			t.Errorf("%d bytes: another plaintext comes back", n)
		}
	}
}

func TestBounds(t *testing.T) {
	if grpcserver.MaxPlaintext != 995 {
		t.Errorf("MaxPlaintext is %d", grpcserver.MaxPlaintext)
	}
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{})
	c, ctx := r.client(t), limited(t)
	ok, err := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: []byte("seed")})
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(ok.Ciphertext)
	flipped[len(flipped)-1] ^= 1
	enc := func(n, uid int) func() error {
		return func() error {
			_, err := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: make([]byte, n), Uid: strings.Repeat("u", uid)})
			return err
		}
	}
	dec := func(id string, ciphertext []byte, uid string, notes map[string][]byte) func() error {
		return func() error {
			_, err := c.Decrypt(ctx, &kmsapi.DecryptRequest{KeyId: id, Ciphertext: ciphertext, Uid: uid, Annotations: notes})
			return err
		}
	}
	for _, tc := range []struct {
		name string
		call func() error
		code codes.Code
		text string
	}{
		{"empty plaintext", enc(0, 1), codes.InvalidArgument, "plaintext: has 0 bytes, want 1 to 995"},
		{"long plaintext", enc(996, 1), codes.InvalidArgument, "plaintext: has 996 bytes"},
		{"long uid", enc(1, 257), codes.InvalidArgument, "uid: has 257 bytes"},
		{"long uid in decrypt", dec("k1-a", ok.Ciphertext, strings.Repeat("u", 257), nil), codes.InvalidArgument, "uid: "},
		{"oversized message", enc(70<<10, 1), codes.ResourceExhausted, "larger than max"},
		{"empty key ID", dec("", ok.Ciphertext, "", nil), codes.InvalidArgument, "key_id: has 0 bytes"},
		{"long key ID", dec(strings.Repeat("k", 1025), ok.Ciphertext, "", nil), codes.InvalidArgument, "key_id: has 1025 bytes"},
		{"unknown key ID", dec("k1-\nz", ok.Ciphertext, "", nil), codes.NotFound, `key ID "k1-?z"; see kleidi keyring show`},
		{"empty ciphertext", dec("k1-a", nil, "", nil), codes.InvalidArgument, "ciphertext: has 0 bytes"},
		{"long ciphertext", dec("k1-a", make([]byte, 1025), "", nil), codes.InvalidArgument, "ciphertext: has 1025 bytes"},
		{"annotations", dec("k1-a", ok.Ciphertext, "", map[string][]byte{"a.b": {1}}), codes.InvalidArgument, "annotations: "},
		{"malformed ciphertext", dec("k1-a", []byte("k8s"), "", nil), codes.InvalidArgument, "ciphertext: not of a form"},
		{"flipped ciphertext", dec("k1-a", flipped, "", nil), codes.DataLoss, "does not authenticate"},
	} {
		t.Run(tc.name, func(t *testing.T) { wantError(t, tc.call(), tc.code, tc.text) })
	}
}

func TestLocked(t *testing.T) {
	keys := newKeys(t, "k1-a")
	r := start(t, keys, grpcserver.ListenConfig{})
	c := r.client(t)
	calls := map[string]func(context.Context) error{
		"Status": func(ctx context.Context) error { _, err := c.Status(ctx, &kmsapi.StatusRequest{}); return err },
		"Encrypt": func(ctx context.Context) error {
			_, err := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: []byte("seed")})
			return err
		},
		"Decrypt": func(ctx context.Context) error {
			_, err := c.Decrypt(ctx, &kmsapi.DecryptRequest{KeyId: "k1-a", Ciphertext: make([]byte, 40)})
			return err
		},
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			keys.fail(fmt.Errorf("unlock: %w", seal.Errorf(seal.CauseBootState, "run kleidi recover", "PCR 4 differs\x1b[31m: %s", strings.Repeat("é", 9000))))
			err := call(limited(t))
			wantError(t, err, codes.Unavailable, "locked (boot-state-not-authorized): unlock: PCR 4 differs?[31m: é", "…; run kleidi recover")
			if n := len(status.Convert(err).Message()); n > 4096 {
				t.Errorf("message of %d bytes", n)
			}
			keys.fail(nil)
			if err := call(limited(t)); status.Code(err) == codes.Unavailable {
				t.Errorf("still %v after unlocking", err)
			}
		})
	}
}

func TestInternalErrorsStayHere(t *testing.T) {
	keys := newKeys(t, "k1-a")
	keys.fail(errors.New("odd fault"))
	r := start(t, keys, grpcserver.ListenConfig{})
	_, err := r.client(t).Status(limited(t), &kmsapi.StatusRequest{})
	wantError(t, err, codes.Internal, "see the log of kleidi serve")
	if strings.Contains(err.Error(), "odd fault") || !strings.Contains(r.log.String(), "odd fault") {
		t.Errorf("client: %v\nlog: %s", err, r.log)
	}
	keys.fail(nil)
	keys.use("")
	_, err = r.client(t).Status(limited(t), &kmsapi.StatusRequest{})
	wantError(t, err, codes.Internal)
}

func TestPanicsNeverShowTheirValue(t *testing.T) {
	const secret = "AGE-SECRET-KEY-1QQ"
	for _, value := range []any{secret, errors.New(secret), []byte(secret), fmt.Stringer(stringer(secret))} {
		keys := newKeys(t, "k1-a")
		keys.panics = value
		r := start(t, keys, grpcserver.ListenConfig{})
		c, ctx := r.client(t), limited(t)
		_, err := c.Status(ctx, &kmsapi.StatusRequest{})
		wantError(t, err, codes.Internal, "internal error in kleidi")
		_, err2 := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: []byte(secret)})
		_, err3 := c.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: []byte(secret), KeyId: "k1-a"})
		for _, shown := range []string{err.Error(), err2.Error(), err3.Error(), r.log.String()} {
			if strings.Contains(shown, secret) || strings.Contains(shown, "65 71 69") {
				t.Errorf("%T: the value shows: %s", value, shown)
			}
		}
		if log := r.log.String(); !strings.Contains(log, fmt.Sprintf("%T", value)) || !strings.Contains(log, "memoryKeys).Encrypt") {
			t.Errorf("the log lacks type or place: %s", log)
		}
		keys.panics = nil
		if _, err := c.Status(ctx, &kmsapi.StatusRequest{}); err != nil {
			t.Errorf("after the panic: %v", err)
		}
	}
}

type stringer string

func (s stringer) String() string { return string(s) }

// TestKeyIDMatchesCiphertext rotates while many encrypt: each answer's key ID
// must open its ciphertext.
func TestKeyIDMatchesCiphertext(t *testing.T) {
	keys := newKeys(t, "k1-a", "k1-b")
	r := start(t, keys, grpcserver.ListenConfig{})
	ctx := limited(t)
	stop := make(chan struct{})
	var rotating, callers sync.WaitGroup
	rotating.Go(func() {
		for {
			for _, id := range []seal.KeyID{"k1-a", "k1-b"} {
				select {
				case <-stop:
					return
				default:
					keys.use(id)
				}
			}
		}
	})
	for range 8 {
		c := r.client(t)
		callers.Go(func() {
			for range 100 {
				enc, err := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: []byte("seed")})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := c.Decrypt(ctx, &kmsapi.DecryptRequest{KeyId: enc.KeyId, Ciphertext: enc.Ciphertext}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	callers.Wait()
	close(stop)
	rotating.Wait()
}

// keepingKeys keeps the plaintexts that pass through, as no Keys should.
type keepingKeys struct {
	*memoryKeys
	in, out []byte
}

func (k *keepingKeys) Encrypt(p []byte) ([]byte, seal.KeyID, error) {
	k.in = p
	return k.memoryKeys.Encrypt(p)
}

func (k *keepingKeys) Decrypt(id seal.KeyID, c []byte) (p []byte, err error) {
	p, err = k.memoryKeys.Decrypt(id, c)
	k.out = p
	return p, err
}

// TestSeedsAreCleared: the server leaves no DEK seed in its messages.
func TestSeedsAreCleared(t *testing.T) {
	keys := &keepingKeys{memoryKeys: newKeys(t, "k1-a")}
	r := start(t, keys, grpcserver.ListenConfig{})
	c, ctx := r.client(t), limited(t)
	seed := bytes.Repeat([]byte{7}, 32)
	enc, err := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: seed})
	if err != nil {
		t.Fatal(err)
	}
	dec, err := c.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: enc.Ciphertext, KeyId: enc.KeyId})
	if err != nil || !bytes.Equal(dec.Plaintext, seed) {
		t.Fatalf("%x, %v", dec.GetPlaintext(), err)
	}
	if zero := make([]byte, 32); !bytes.Equal(keys.in, zero) || !bytes.Equal(keys.out, zero) {
		t.Errorf("left behind: %x after Encrypt, %x after Decrypt", keys.in, keys.out)
	}
}

func TestMetrics(t *testing.T) {
	keys := newKeys(t, "k1-a")
	r := start(t, keys, grpcserver.ListenConfig{})
	c, ctx := r.client(t), limited(t)
	for range 3 {
		if _, err := c.Status(ctx, &kmsapi.StatusRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = c.Decrypt(ctx, &kmsapi.DecryptRequest{KeyId: "k1-z", Ciphertext: make([]byte, 40)})
	_, _ = c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: make([]byte, 70<<10)})
	keys.fail(seal.Errorf(seal.CauseStarting, "", "starting"))
	_, _ = c.Status(ctx, &kmsapi.StatusRequest{})
	got, err := testutil.GatherAndCount(r.reg, "kleidi_kms_operations_total")
	if err != nil || got != 30 {
		t.Errorf("%d series before their first use (%v), want 3 methods by 10 codes", got, err)
	}
	for _, line := range []string{
		`kleidi_kms_operations_total{code="OK",method="Status"} 3`,
		`kleidi_kms_operations_total{code="Unavailable",method="Status"} 1`,
		`kleidi_kms_operations_total{code="NotFound",method="Decrypt"} 1`,
		`kleidi_kms_operations_total{code="ResourceExhausted",method="Encrypt"} 1`,
		`kleidi_kms_operation_duration_seconds_count{method="Status"} 4`,
	} {
		if text := exposition(t, r.reg); !strings.Contains(text, line+"\n") {
			t.Errorf("no %s in\n%s", line, text)
		}
	}
	if _, err := grpcserver.New(keys, grpcserver.Options{Registerer: r.reg}); err == nil {
		t.Error("registering twice succeeds")
	}
}

func TestUncommonCalls(t *testing.T) {
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{})
	conn := r.conn(t)
	// Not UTF-8 in a string field, so not a proto3 message.
	err := conn.Invoke(limited(t), kmsapi.KeyManagementService_Decrypt_FullMethodName, &rawMessage{0x1a, 1, 0xff}, &rawMessage{}, rawCodec())
	wantError(t, err, codes.InvalidArgument, "not a KMS v2 message")
	err = conn.Invoke(limited(t), "/v2.KeyManagementService/Rotate", &kmsapi.StatusRequest{}, &kmsapi.StatusResponse{})
	wantError(t, err, codes.Unimplemented)
	err = conn.Invoke(limited(t), "/v1beta1.KeyManagementService/Version", &kmsapi.StatusRequest{}, &kmsapi.StatusResponse{})
	wantError(t, err, codes.Unimplemented)
	ctx := metadata.AppendToOutgoingContext(limited(t), "x", strings.Repeat("h", 64<<10))
	if err := conn.Invoke(ctx, kmsapi.KeyManagementService_Status_FullMethodName, &kmsapi.StatusRequest{}, &kmsapi.StatusResponse{}); err == nil {
		t.Error("64 KiB of headers are accepted")
	}
	if _, err := r.client(t).Status(limited(t), &kmsapi.StatusRequest{}); err != nil {
		t.Error(err)
	}
}
