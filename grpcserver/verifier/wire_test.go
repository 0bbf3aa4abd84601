package verifier

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// wireVectors are the messages of the remote gate, byte by byte, because nodes and
// verifiers of different versions talk to each other.
var wireVectors = map[string]string{
	"hello":     "0a8b010a10010101010101010101010101010101011205616c7068611a05020202020222060303030303032a07040404040404043222050505050505050505050505050505050505050505050505050505050505050505053a1006060606060606060606060606060606422207070707070707070707070707070707070707070707070707070707070707070707",
	"challenge": "12460a20010101010101010101010101010101010101010101010101010101010101010112090202020202020202021a0a0303030303030303030322067368613338342a0300070b",
	"statement": "1a89010a200101010101010101010101010101010101010101010101010101010101010101120b02020202020202020202021a0c03030303030303030303030322240800122004040404040404040404040404040404040404040404040404040404040404042224080b12200505050505050505050505050505050505050505050505050505050505050505",
	"firmware":  "220f0a0d01010101010101010101010101",
	"userspace": "2210120e0202020202020202020202020202",
	"signature": "2a110a0f030303030303030303030303030303",
	"refusal":   "321c0a046e6f64651207756e6b6e6f776e1a0b7265676973746572206974",
}

func fill(first byte, n int) []byte { return bytes.Repeat([]byte{first}, n) }

// TestWireVectors: no byte that crosses the wire changes within a version.
func TestWireVectors(t *testing.T) {
	hello := &remote.Hello{Cluster: fill(1, 16), Node: "alpha", EK: fill(2, 5), EKCertificate: fill(3, 6), AK: fill(4, 7), SRK: fill(5, 34), NonceTPM: fill(6, 16), Key: fill(7, 34)}
	challenge := &remote.Challenge{Nonce: fill(1, 32), Credential: fill(2, 9), Secret: fill(3, 10), Bank: crypto.SHA384, PCRs: []int{0, 7, 11}}
	evidence := &remote.Evidence{Proof: fill(1, 32), Attest: fill(2, 11), Signature: fill(3, 12), PCRs: map[int][]byte{0: fill(4, 32), 11: fill(5, 32)}}
	messages := map[string]proto.Message{
		"hello": fromHello(hello), "challenge": fromChallenge(challenge), "statement": fromEvidence(evidence),
		"firmware":  &FromAttester{Message: &FromAttester_Log{&LogPart{Firmware: fill(1, 13)}}},
		"userspace": &FromAttester{Message: &FromAttester_Log{&LogPart{Userspace: fill(2, 14)}}},
		"signature": &FromVerifier{Message: &FromVerifier_Signature{&Signature{Signature: fill(3, 15)}}},
		"refusal":   &FromVerifier{Message: &FromVerifier_Refusal{&Refusal{Check: "node", Reason: "unknown", Hint: "register it"}}},
	}
	for name, m := range messages {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if got := hex.EncodeToString(b); err != nil || got != wireVectors[name] {
			t.Errorf("%s: %s, %v", name, got, err)
		}
		again := m.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(b, again); err != nil || !proto.Equal(m, again) {
			t.Errorf("%s: it is read as %v, %v", name, again, err)
		}
	}
	if serviceName != "kleidi.verifier.v1.RemoteGate" || methodName != "Attest" || remote.ExporterLabel != "EXPORTER-kleidi-remote-gate-v1" {
		t.Errorf("%s/%s, %s", serviceName, methodName, remote.ExporterLabel)
	}
}
