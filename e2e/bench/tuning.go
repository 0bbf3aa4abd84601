package main

import (
	"context"
	"fmt"
	"slices"

	"google.golang.org/grpc"
)

// tunings are compared; the first one is the default of Go and gRPC.
var tunings = []tuning{
	{},
	{gogc: 150}, {gogc: 200},
	{workers: 64},
	{gogc: 150, workers: 64}, {gogc: 200, workers: 64},
	{gogc: 200, workers: 64, buffers: 4 << 10},
	{gogc: 400, workers: 64, buffers: 4 << 10},
}

// tuned is a plugin with a tuning, and its measurements.
type tuned struct {
	tuning
	*plugin
	conn  *grpc.ClientConn
	ops   []operation
	p50   [2][]float64 // of Encrypt and Decrypt
	cpu   []float64    // µs per call
	calls []float64    // per second
}

// printTunings compares tunings of a plugin that does nothing, in turns, with this
// number of callers at the same time.
func printTunings(ctx context.Context, o options, dir string, callers int) error {
	var all []*tuned
	for _, t := range tunings {
		p, err := startTuned(ctx, "serve-nothing", dir, t)
		if err != nil {
			return err
		}
		defer p.stop()
		conn, err := dial(p.socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		ops, err := operations(ctx, conn)
		if err != nil {
			return err
		}
		all = append(all, &tuned{tuning: t, plugin: p, conn: conn, ops: ops})
	}
	for i := range o.pairs + 1 {
		for j := range all {
			if err := all[(i+j)%len(all)].measure(ctx, o, callers, i > 0); err != nil {
				return err
			}
		}
	}
	fmt.Printf("\ntunings of doing nothing, %d callers, medians of %d rounds in turns, and the ratio to the first\n", callers, o.pairs)
	fmt.Printf("%5s %7s %7s  %18s %18s %16s %18s  %9s %16s\n", "GOGC", "workers", "buffers", "Encrypt p50 µs", "Decrypt p50 µs", "CPU µs a call", "calls/s", "MiB most", "256 conns MiB")
	for _, t := range all {
		_, most := residentSet(t.pid)
		t.conn.Close() // the connection would be one too many
		connected, err := withConnections(ctx, t.plugin)
		if err != nil {
			return err
		}
		fmt.Printf("%5d %7d %7d ", t.gogc, t.workers, t.buffers)
		base := all[0]
		for _, c := range [][2][]float64{{t.p50[0], base.p50[0]}, {t.p50[1], base.p50[1]}, {t.cpu, base.cpu}, {t.calls, base.calls}} {
			fmt.Printf("%10.1f = %5.3f", middle(c[0]), middle(c[0])/middle(c[1]))
		}
		fmt.Printf(" %9.1f %16.1f\n", most, connected)
	}
	return nil
}

// measure takes a slice of each operation; the first round warms up and doesn't count.
func (t *tuned) measure(ctx context.Context, o options, callers int, counts bool) error {
	before, err := cpuTime(t.pid)
	if err != nil {
		return err
	}
	var calls, perSecond float64
	for i := range t.p50 {
		f, err := slice(ctx, t.ops[i], callers, o.slice)
		if err != nil {
			return err
		}
		calls += f.calls
		perSecond += f.perSecond / float64(len(t.p50))
		if counts {
			t.p50[i] = append(t.p50[i], f.p50)
		}
	}
	after, err := cpuTime(t.pid)
	if err == nil && counts {
		t.cpu = append(t.cpu, float64((after-before).Microseconds())/calls)
		t.calls = append(t.calls, perSecond)
	}
	return err
}

func middle(v []float64) float64 { return slices.Sorted(slices.Values(v))[len(v)/2] }
