package usagetest

import (
	"bytes"
	"net"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// Etcd answers a client that reads all of its keys, as a running etcd does.
type Etcd struct {
	URL string

	cluster uint64
	mu      sync.Mutex
	all     []Change
	script  [][]byte
}

// StartEtcd starts an etcd with the content of the changes, and stops it in a clean-up.
func StartEtcd(cleanup func(func()), stored ...Change) *Etcd {
	return start(7, cleanup, stored)
}

// StartKine is StartEtcd for kine over PostgreSQL. kine names no cluster, and passes the
// bounds of a range to PostgreSQL, which refuses a zero byte in a string. kine removes
// such a byte only from the end of the first key.
func StartKine(cleanup func(func()), stored ...Change) *Etcd {
	return start(0, cleanup, stored)
}

func start(cluster uint64, cleanup func(func()), stored []Change) *Etcd {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err) // only tests call this
	}
	e := &Etcd{URL: "http://" + l.Addr().String(), cluster: cluster}
	e.Put(stored...)
	s := grpc.NewServer(grpc.ForceServerCodec(bytesCodec{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var request []byte
		if err := stream.RecvMsg(&request); err != nil {
			return err
		}
		answer, err := e.answer(request)
		if err != nil {
			return err
		}
		return stream.SendMsg(&answer)
	}))
	go func() { _ = s.Serve(l) }()
	cleanup(s.Stop)
	return e
}

// Put stores values, or deletes the keys whose value is nil.
func (e *Etcd) Put(stored ...Change) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range stored {
		e.all = slices.DeleteFunc(e.all, func(old Change) bool { return old.Key == c.Key })
		if c.Value != nil {
			e.all = append(e.all, c)
		}
	}
	slices.SortFunc(e.all, func(a, b Change) int { return bytes.Compare([]byte(a.Key), []byte(b.Key)) })
}

// Script has the next requests answered by these answers, one after the other.
func (e *Etcd) Script(answers ...[]byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.script = answers
}

// Answer returns the whole answer of a member to a range request.
func Answer(cluster, revision uint64, found ...Change) []byte {
	return number(answered(cluster, revision, found), 4, uint64(len(found)))
}

// Part returns an answer that announces more keys.
func Part(cluster, revision uint64, found ...Change) []byte {
	return number(number(answered(cluster, revision, found), 3, 1), 4, uint64(len(found)))
}

func answered(cluster, revision uint64, found []Change) []byte {
	answer := field(nil, 1, number(number(nil, 1, cluster), 3, revision)) // a header
	for _, c := range found {
		answer = field(answer, 2, field(field(nil, 1, []byte(c.Key)), 5, c.Value))
	}
	return answer
}

// answer answers a range request with the keys from the first one up to the end.
func (e *Etcd) answer(request []byte) ([]byte, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.script) > 0 {
		next := e.script[0]
		e.script = e.script[1:]
		return next, nil
	}
	var from, end string
	for b := request; len(b) > 0; {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			break
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
			break
		}
		if value, _ := protowire.ConsumeBytes(b); number == 1 {
			from = string(value)
		} else if number == 2 {
			end = string(value)
		}
		b = b[n:]
	}
	if e.cluster == 0 && strings.Contains(strings.TrimSuffix(from, "\x00")+end, "\x00") {
		return nil, status.Error(codes.Unknown, `ERROR: invalid byte sequence for encoding "UTF8": 0x00 (SQLSTATE 22021)`)
	}
	found := slices.DeleteFunc(slices.Clone(e.all), func(c Change) bool { return c.Key < from || c.Key >= end && end != "\x00" })
	return Answer(e.cluster, 9, found...), nil
}

func field(b []byte, n protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), value)
}

func number(b []byte, n protowire.Number, value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), value)
}

type bytesCodec struct{}

func (bytesCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (bytesCodec) Name() string                       { return "proto" }
