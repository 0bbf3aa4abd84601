package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	kmsapi "k8s.io/kms/apis/v2"
)

// allocationCalls is the number of calls in an average.
const allocationCalls = 2000

// printAllocations runs both servers in this process, where their allocations can be
// counted. The client allocates the same for both, so the difference is kleidi's.
func printAllocations(ctx context.Context, dir string) error {
	var counted [2][]allocation
	for i, name := range []string{"serve-memory", "serve-nothing"} {
		path := filepath.Join(dir, "in-process-"+name)
		s, l, err := newServer(name, path, tuning{})
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

// allocation holds the allocations of one call of op.
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
		now, most := residentSet(p.pid)
		fmt.Printf("%-14s %.1f MiB, at most %.1f MiB\n", p.name, now, most)
	}
}

// manyConnections is the number of connections that kleidi accepts.
const manyConnections = 256

// printConnections opens many connections to each plugin, with one call each, and
// prints the memory of the plugin meanwhile.
func printConnections(ctx context.Context, plugins ...*plugin) error {
	for _, p := range plugins {
		before, _ := residentSet(p.pid)
		during, err := withConnections(ctx, p)
		if err != nil {
			return fmt.Errorf("%d connections to %s: %w", manyConnections, p.name, err)
		}
		fmt.Printf("%-14s %.1f MiB (%.1f MB) with %d connections, %.1f MiB before\n", p.name, during, during*(1<<20)/1e6, manyConnections, before)
	}
	return nil
}

func withConnections(ctx context.Context, p *plugin) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for range manyConnections {
		conn, err := dial(p.socket)
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		if _, err := kmsapi.NewKeyManagementServiceClient(conn).Status(ctx, &kmsapi.StatusRequest{}); err != nil {
			return 0, err
		}
	}
	during, _ := residentSet(p.pid)
	return during, nil
}

// residentSet returns the present and the largest memory of the process in MiB, or
// zeros if that is unknown.
func residentSet(pid int) (now, most float64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(b)) {
		var kb float64
		switch name, value, _ := strings.Cut(line, ":"); {
		case name == "VmRSS":
			_, _ = fmt.Sscan(value, &kb)
			now = kb / 1024
		case name == "VmHWM":
			_, _ = fmt.Sscan(value, &kb)
			most = kb / 1024
		}
	}
	return now, most
}

// cpuTime returns how long a process has run on processors, by its CPU clock
// (clock_getcpuclockid(3)).
func cpuTime(pid int) (time.Duration, error) {
	const scheduler = 2 // CPUCLOCK_SCHED
	var t unix.Timespec
	err := unix.ClockGettime(int32(^pid<<3|scheduler), &t)
	return time.Duration(t.Nano()), err
}
