package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/internal/usage/usagetest"
)

const (
	// livePage is the number of objects in an answer, kleidi's and kube-apiserver's own.
	livePage = 500
	// liveBatch is the number of objects in a transaction, etcd's limit by default.
	liveBatch = 128
)

// printLiveUsage compares the count of the objects in a running etcd with a plain read of
// the same pages, which looks only for the last key of each. They run in turns.
func printLiveUsage(ctx context.Context, dir string) error {
	paths, err := built(ctx, "etcd")
	if err != nil {
		return err
	}
	url, stop, err := startEtcd(ctx, paths[0], dir)
	if err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	defer stop()
	conn, err := grpc.NewClient("passthrough:///"+strings.TrimPrefix(url, "http://"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(bytesCodec{}), grpc.MaxCallRecvMsgSize(32<<20)))
	if err != nil {
		return err
	}
	defer conn.Close()
	etcd := plainEtcd{conn}
	for round := range 2 {
		if err := etcd.store(ctx, usageRound(round)); err != nil {
			return fmt.Errorf("etcd: store: %w", err)
		}
	}
	var counts, reads []time.Duration
	for range usageRounds {
		start := time.Now()
		read, err := etcd.readAll(ctx, usage.DefaultPrefix)
		if err != nil {
			return fmt.Errorf("etcd: read: %w", err)
		}
		reads = append(reads, time.Since(start))
		start = time.Now()
		r, err := (&usage.Etcd{Endpoints: []string{url}}).Read(ctx, usage.DefaultPrefix, nil)
		if err != nil {
			return err
		}
		counts = append(counts, time.Since(start))
		if r.Objects != usageObjects || read != usageObjects {
			return fmt.Errorf("usage counts %d objects and the plain read %d; %d are stored", r.Objects, read, usageObjects)
		}
	}
	count, read := median(counts), median(reads)
	fmt.Printf("\nusage of a running etcd: %d objects, medians of %d in turns\n", usageObjects, usageRounds)
	fmt.Printf("%-29s %6.0f ms, %.0f objects/s\n", "kleidi usage", inMS(count), usageObjects/count.Seconds())
	fmt.Printf("%-29s %6.0f ms (ratio %.2f)\n", "a plain read of all pages", inMS(read), count.Seconds()/read.Seconds())
	return nil
}

// plainEtcd is a client of etcd that parses no more of an answer than it needs.
type plainEtcd struct{ *grpc.ClientConn }

// bytesCodec leaves messages as bytes.
type bytesCodec struct{}

func (bytesCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (bytesCodec) Name() string                       { return "proto" }

func (e plainEtcd) call(ctx context.Context, method string, request []byte) (answer []byte, err error) {
	return answer, e.Invoke(ctx, "/etcdserverpb.KV/"+method, &request, &answer)
}

// message returns a message of protobuf's bytes fields 1, 2 and so on.
func message(fields ...string) (b []byte) {
	for i, f := range fields {
		b = protowire.AppendString(protowire.AppendTag(b, protowire.Number(i+1), protowire.BytesType), f)
	}
	return b
}

func field(b []byte, n protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), value)
}

// store writes the objects.
func (e plainEtcd) store(ctx context.Context, objects []usagetest.Change) error {
	for len(objects) > 0 {
		var request []byte // TxnRequest
		n := min(liveBatch, len(objects))
		for _, o := range objects[:n] {
			put := field(nil, 2, message(o.Key, string(o.Value))) // RequestOp.request_put
			request = field(request, 2, put)                      // success
		}
		if _, err := e.call(ctx, "Txn", request); err != nil {
			return err
		}
		objects = objects[n:]
	}
	return nil
}

// readAll reads everything below a prefix, and returns the number of objects.
func (e plainEtcd) readAll(ctx context.Context, prefix string) (objects int, err error) {
	from, end := prefix+"/", prefix+"0"
	for {
		request := message(from, end)
		request = protowire.AppendVarint(protowire.AppendTag(request, 3, protowire.VarintType), livePage) // limit
		answer, err := e.call(ctx, "Range", request)
		if err != nil {
			return 0, err
		}
		pairs := 0
		var last []byte
		for len(answer) > 0 {
			number, kind, n := protowire.ConsumeField(answer)
			if n < 0 {
				return 0, protowire.ParseError(n)
			}
			if number == 2 && kind == protowire.BytesType { // kvs
				pairs++
				last = answer[:n]
			}
			answer = answer[n:]
		}
		objects += pairs
		if pairs < livePage {
			return objects, nil
		}
		_, _, n := protowire.ConsumeTag(last)
		pair, _ := protowire.ConsumeBytes(last[n:])
		_, _, n = protowire.ConsumeTag(pair) // KeyValue.key
		key, _ := protowire.ConsumeBytes(pair[n:])
		from = string(key) + "\x00"
	}
}
