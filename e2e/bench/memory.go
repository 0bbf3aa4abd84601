package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

// allocationCalls is how many calls are averaged.
const allocationCalls = 2000

// printAllocations runs both servers in this process, where their allocations can be
// counted. Those of the client are the same for both: the difference is kleidi's.
func printAllocations(ctx context.Context, dir string) error {
	var counted [2][]allocation
	for i, name := range []string{"serve-memory", "serve-nothing"} {
		path := filepath.Join(dir, "in-process-"+name)
		s, l, err := newServer(name, path)
		if err != nil {
			return err
		}
		go func() { _ = s.Serve(l) }()
		counted[i], err = allocations(ctx, path)
		l.Close()
		if err != nil {
			return err
		}
	}
	fmt.Printf("\nallocations per call, client and server in one process: grpcserver / nothing\n")
	for i, a := range counted[0] {
		b := counted[1][i]
		fmt.Printf("%-8s %6.1f / %6.1f (%+.1f)   %7.0f / %7.0f bytes (%+.0f)\n",
			a.op, a.count, b.count, a.count-b.count, a.bytes, b.bytes, a.bytes-b.bytes)
	}
	return nil
}

// allocation is what one call of op allocates.
type allocation struct {
	op           string
	count, bytes float64
}

func allocations(ctx context.Context, path string) ([]allocation, error) {
	conn, err := dial(path)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ops, err := operations(ctx, conn)
	if err != nil {
		return nil, err
	}
	var out []allocation
	for _, op := range ops {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range allocationCalls {
			if err := op.call(ctx); err != nil {
				return nil, err
			}
		}
		runtime.ReadMemStats(&after)
		out = append(out, allocation{op.name, float64(after.Mallocs-before.Mallocs) / allocationCalls,
			float64(after.TotalAlloc-before.TotalAlloc) / allocationCalls})
	}
	return out, nil
}

func printMemory(plugins ...*plugin) {
	fmt.Printf("\nmemory after all of this\n")
	for _, p := range plugins {
		fmt.Printf("%-14s %s\n", p.name, residentSet(p.pid))
	}
}

// residentSet is what the process occupies now, and what it did at most.
func residentSet(pid int) string {
	if pid == 0 {
		return "unknown: say -pid"
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err.Error()
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "VmRSS:") || strings.HasPrefix(line, "VmHWM:") {
			out = append(out, strings.Join(strings.Fields(line), " "))
		}
	}
	return strings.Join(out, ", ")
}
