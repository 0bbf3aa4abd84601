package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"
)

// operation is one call that can be repeated.
type operation struct {
	name string
	call func(context.Context) error
}

// dial connects as kube-apiserver does.
func dial(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///kms", grpc.WithAuthority("localhost"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
}

// timeout is kube-apiserver's default timeout for each call.
const timeout = 3 * time.Second

func operations(ctx context.Context, conn *grpc.ClientConn) ([]operation, error) {
	c := kmsapi.NewKeyManagementServiceClient(conn)
	seed := make([]byte, 32)
	uid := "8a1c2f0e-0000-4000-8000-000000000000"
	enc, err := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: seed, Uid: uid})
	if err != nil {
		return nil, err
	}
	within := func(f func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			return f(ctx)
		}
	}
	return []operation{
		{"Encrypt", within(func(ctx context.Context) error {
			_, err := c.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: seed, Uid: uid})
			return err
		})},
		{"Decrypt", within(func(ctx context.Context) error {
			_, err := c.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: enc.Ciphertext, KeyId: enc.KeyId, Uid: uid})
			return err
		})},
		{"Status", within(func(ctx context.Context) error {
			_, err := c.Status(ctx, &kmsapi.StatusRequest{})
			return err
		})},
	}, nil
}

// figures are the figures of one slice.
type figures struct{ p50, p99, perSecond, calls float64 } // p50 and p99 in µs

// slice lets callers repeat op for d.
func slice(ctx context.Context, op operation, callers int, d time.Duration) (figures, error) {
	latencies := make([][]time.Duration, callers)
	errs := make([]error, callers)
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for time.Since(begin) < d && errs[i] == nil {
				t := time.Now()
				errs[i] = op.call(ctx)
				latencies[i] = append(latencies[i], time.Since(t))
			}
		})
	}
	wg.Wait()
	took := time.Since(begin)
	for _, err := range errs {
		if err != nil {
			return figures{}, fmt.Errorf("%s: %w", op.name, err)
		}
	}
	all := slices.Sorted(slices.Values(slices.Concat(latencies...)))
	at := func(q float64) float64 { return float64(all[int(q*float64(len(all)-1))].Nanoseconds()) / 1e3 }
	return figures{at(0.50), at(0.99), float64(len(all)) / took.Seconds(), float64(len(all))}, nil
}

// compare prints one line for each operation and number of callers, with the raw pairs
// below. It returns the largest ratio of p50 with one caller.
func compare(ctx context.Context, o options, callers []int, subject, nothing *plugin) (worst float64, err error) {
	var ops [2][]operation
	for i, p := range []*plugin{subject, nothing} {
		conn, err := dial(p.socket)
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		if ops[i], err = operations(ctx, conn); err != nil {
			return 0, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	fmt.Printf("%s against %s: %d interleaved pairs of %v; medians, and their ratio\n", subject.name, nothing.name, o.pairs, o.slice)
	fmt.Printf("%-8s %7s  %27s  %27s  %29s\n", "", "callers", "p50 µs", "p99 µs", "calls/s")
	for i := range ops[0] {
		for _, n := range callers {
			pairs, err := interleave(ctx, o, n, ops[0][i], ops[1][i])
			if err != nil {
				return 0, err
			}
			ratio := report(ops[0][i].name, n, pairs)
			if n == 1 {
				worst = max(worst, ratio)
			}
		}
	}
	return worst, nil
}

// interleave measures both in turns and alternates which goes first. The first pair
// warms up and is thrown away.
func interleave(ctx context.Context, o options, callers int, a, b operation) (pairs [][2]figures, err error) {
	both := [2]operation{a, b}
	for i := range o.pairs + 1 {
		var pair [2]figures
		for j := range both {
			k := (i + j) % 2
			if pair[k], err = slice(ctx, both[k], callers, o.slice); err != nil {
				return nil, err
			}
		}
		pairs = append(pairs, pair)
	}
	return pairs[1:], nil
}

// report prints the medians and the raw figures, and returns the ratio of the p50s.
func report(name string, callers int, pairs [][2]figures) float64 {
	median := func(k int, f func(figures) float64) float64 {
		var v []float64
		for _, p := range pairs {
			v = append(v, f(p[k]))
		}
		slices.Sort(v)
		return v[len(v)/2]
	}
	columns := []struct {
		name string
		of   func(figures) float64
	}{
		{"p50", func(f figures) float64 { return f.p50 }},
		{"p99", func(f figures) float64 { return f.p99 }},
		{"calls/s", func(f figures) float64 { return f.perSecond }},
	}
	var ratios []float64
	fmt.Printf("%-8s %7d", name, callers)
	for _, c := range columns {
		a, b := median(0, c.of), median(1, c.of)
		ratios = append(ratios, a/b)
		fmt.Printf("  %8.1f / %8.1f = %5.3f", a, b, a/b)
	}
	fmt.Println()
	for _, c := range columns {
		var raw []string
		for _, p := range pairs {
			raw = append(raw, fmt.Sprintf("%.0f/%.0f", c.of(p[0]), c.of(p[1])))
		}
		fmt.Printf("    %-7s %s\n", c.name, strings.Join(raw, " "))
	}
	return ratios[0]
}
