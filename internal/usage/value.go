package usage

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"
)

// Provider is the provider of kube-apiserver's EncryptionConfiguration that wrote a value.
type Provider string

// The providers.
const (
	Identity  Provider = "identity" // in the clear
	AESCBC    Provider = "aescbc"
	AESGCM    Provider = "aesgcm"
	Secretbox Provider = "secretbox"
	KMSv1     Provider = "kms-v1"
	KMSv2     Provider = "kms-v2"
	// Unknown wrote a value that is marked as encrypted in a way that this version of
	// kleidi does not know, or that is damaged after the mark.
	Unknown Provider = "unknown"
)

// Key names the key that encrypted a stored value, according to the value.
type Key struct {
	Provider Provider `json:"provider"`
	// Name is the name of the KMS plugin in the EncryptionConfiguration.
	Name string `json:"name,omitempty"`
	// ID is the key_id of KMS v2, or the name of a key of aescbc, aesgcm or secretbox.
	ID string `json:"id,omitempty"`
}

// mark begins every value that is not stored in the clear; see k8s.io/apiserver
// pkg/storage/value.
const mark = "k8s:enc:"

// prefixes are the texts that follow the mark. After them comes a name, up to a colon.
var prefixes = []struct {
	prefix   []byte
	provider Provider
}{
	{[]byte("kms:v2:"), KMSv2},
	{[]byte("kms:v1:"), KMSv1},
	{[]byte("aescbc:v1:"), AESCBC},
	{[]byte("aesgcm:v1:"), AESGCM},
	{[]byte("secretbox:v1:"), Secretbox},
}

// header is a [Key] within the bytes of a value, so that counting allocates nothing.
type header struct {
	provider Provider
	name, id []byte
}

// maxName bounds a name and a key ID, in bytes. KMS v2 allows a key_id of 1024.
const maxName = 1024

// parseHeader reads which key encrypted a stored value.
func parseHeader(value []byte) header {
	rest, ok := bytes.CutPrefix(value, []byte(mark))
	if !ok {
		return header{provider: Identity}
	}
	for _, p := range prefixes {
		named, ok := bytes.CutPrefix(rest, p.prefix)
		if !ok {
			continue
		}
		name, encrypted, ok := bytes.Cut(named, []byte(":"))
		switch {
		case !ok || len(name) == 0 || len(name) > maxName || len(encrypted) == 0:
			return header{provider: Unknown}
		case p.provider == KMSv1:
			return header{KMSv1, name, nil} // only the plugin knows the key
		case p.provider != KMSv2:
			return header{p.provider, nil, name}
		}
		id, ok := keyIDOf(encrypted)
		if !ok {
			return header{provider: Unknown}
		}
		return header{KMSv2, name, id}
	}
	return header{provider: Unknown}
}

// Fields of EncryptedObject, see k8s.io/apiserver
// pkg/storage/value/encrypt/envelope/kmsv2/v2/api.proto.
const (
	fieldEncryptedData protowire.Number = 1
	fieldKeyID         protowire.Number = 2
)

// keyIDOf returns the key ID of an EncryptedObject. The object must parse as a whole,
// since kube-apiserver could not read it otherwise.
func keyIDOf(object []byte) (id []byte, ok bool) {
	data := false
	err := eachField(object, func(field protowire.Number, value []byte, _ uint64) error {
		switch field {
		case fieldEncryptedData:
			data = len(value) > 0
		case fieldKeyID:
			id = value // the last one counts, as in protobuf
		}
		return nil
	})
	return id, err == nil && data && len(id) > 0 && len(id) <= maxName
}

// eachField calls f with each field of a protobuf message: with its bytes, or with its
// number if it is a varint. Other fields are skipped.
func eachField(message []byte, f func(field protowire.Number, value []byte, number uint64) error) error {
	for len(message) > 0 {
		field, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		var err error
		switch kind {
		case protowire.BytesType:
			var value []byte
			if value, n = protowire.ConsumeBytes(message); n >= 0 {
				err = f(field, value, 0)
			}
		case protowire.VarintType:
			var number uint64
			if number, n = protowire.ConsumeVarint(message); n >= 0 {
				err = f(field, nil, number)
			}
		default:
			n = protowire.ConsumeFieldValue(field, kind, message)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err != nil {
			return err
		}
		message = message[n:]
	}
	return nil
}
