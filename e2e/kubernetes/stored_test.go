package kubernetes

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// prefix begins every value that kube-apiserver has encrypted with the KMS v2 provider
// kleidi.
const prefix = "k8s:enc:kms:v2:kleidi:"

// stored is an encrypted object in kube-apiserver's etcd, see EncryptedObject in
// k8s.io/apiserver pkg/storage/value/encrypt/envelope/kmsv2/v2/api.proto.
type stored struct {
	data, seed []byte
	keyID      string
}

func parseStored(raw []byte) (stored, error) {
	var s stored
	b, ok := bytes.CutPrefix(raw, []byte(prefix))
	if !ok {
		return s, fmt.Errorf("value begins %q, want %q", raw[:min(len(raw), len(prefix))], prefix)
	}
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return s, protowire.ParseError(n)
		}
		b = b[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(field, kind, b); n < 0 {
				return s, protowire.ParseError(n)
			}
			b = b[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return s, protowire.ParseError(n)
		}
		b = b[n:]
		switch field {
		case 1:
			s.data = value
		case 2:
			s.keyID = string(value)
		case 3:
			s.seed = value
		}
	}
	if len(s.data) == 0 || len(s.seed) == 0 || s.keyID == "" {
		return s, errors.New("value lacks data, DEK seed or key ID")
	}
	return s, nil
}

func TestParseStored(t *testing.T) {
	b := []byte(prefix)
	for field, value := range map[protowire.Number]string{1: "data", 2: "k1-abc", 3: "seed", 4: "annotation"} {
		b = protowire.AppendTag(b, field, protowire.BytesType)
		b = protowire.AppendString(b, value)
	}
	b = protowire.AppendTag(b, 5, protowire.VarintType)
	b = protowire.AppendVarint(b, 1)
	s, err := parseStored(b)
	if err != nil || s.keyID != "k1-abc" || string(s.data) != "data" || string(s.seed) != "seed" {
		t.Fatalf("%+v, %v", s, err)
	}
	for _, bad := range [][]byte{nil, []byte("k8s\x00plain"), b[:len(prefix)], b[:len(prefix)+3]} {
		if _, err := parseStored(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
