// Command bench measures kleidi against a KMS v2 plugin that does nothing, on the same
// gRPC stack, with kube-apiserver's way of calling: one connection, a seed of 32 bytes.
// The two are measured in turns, slice by slice, so that any other load of the machine
// hits both.
//
//	bench -kleidi bin/kleidi     starts the binary on a simulated machine with a swtpm
//	bench -socket S [-pid N]     measures a plugin that runs already
//	bench                        measures package grpcserver with a keyring in memory
//	bench -kleidi bin/kleidi -apiserver
//	                             measures Secrets through real kube-apiservers
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

type options struct {
	kleidi, socket string
	pid            int
	vanilla        bool
	callers        string
	pairs          int
	slice          time.Duration
	starts         int
	wrappers       string
	maxP50         float64
	tunings        bool
	apiserver      bool
	maxCPU         float64
}

func main() {
	if len(os.Args) == 3 && strings.HasPrefix(os.Args[1], "serve-") {
		exit(servePlugin(os.Args[1], os.Args[2]))
	}
	var o options
	flag.StringVar(&o.kleidi, "kleidi", "", "the kleidi binary to start")
	flag.StringVar(&o.socket, "socket", "", "the KMS socket of a plugin that runs already")
	flag.IntVar(&o.pid, "pid", 0, "its process, to read the memory that it uses")
	flag.BoolVar(&o.vanilla, "vanilla", false, "give the plugin that does nothing gRPC's defaults, not kleidi's limits")
	flag.StringVar(&o.callers, "callers", "1,8,64", "numbers of concurrent callers")
	flag.IntVar(&o.pairs, "pairs", 21, "pairs of slices for each line")
	flag.DurationVar(&o.slice, "slice", 100*time.Millisecond, "length of a slice")
	flag.IntVar(&o.starts, "starts", 5, "how often to start kleidi (with -kleidi), to see how soon it answers")
	flag.StringVar(&o.wrappers, "wrappers", "recovery,pkcs11,vault", "wrappers whose time to open a slot is compared with the TPM's (with -kleidi)")
	flag.Float64Var(&o.maxP50, "max-p50", 0, "fail if the p50 with one caller is more than this times that of doing nothing")
	flag.BoolVar(&o.tunings, "tunings", true, "compare what the garbage collector's pace, gRPC's workers and its buffers are worth")
	flag.BoolVar(&o.apiserver, "apiserver", false, "measure Secrets through real kube-apiservers instead (with -kleidi)")
	flag.Float64Var(&o.maxCPU, "max-cpu", 0, "with -apiserver, fail if kube-apiserver's CPU is more than this times that with a plugin that does nothing")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	exit(run(ctx, o))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(ctx context.Context, o options) error {
	callers, err := numbers(o.callers)
	if err != nil {
		return fmt.Errorf("-callers: %w", err)
	}
	dir, err := os.MkdirTemp("", "kleidi-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.apiserver {
		return runAPIServer(ctx, o, dir)
	}
	subject, err := startSubject(ctx, o, dir)
	if err != nil {
		return err
	}
	defer subject.stop()
	name := "serve-nothing"
	if o.vanilla {
		name = "serve-vanilla"
	}
	nothing, err := startSelf(ctx, name, dir)
	if err != nil {
		return err
	}
	defer nothing.stop()
	worst, err := compare(ctx, o, callers, subject, nothing)
	if err != nil {
		return err
	}
	if err := printAllocations(ctx, dir); err != nil {
		return err
	}
	printMemory(subject, nothing)
	if err := printConnections(ctx, subject, nothing); err != nil {
		return err
	}
	if err := printUsage(ctx, dir); err != nil {
		return err
	}
	if err := printLiveUsage(ctx, dir); err != nil {
		return err
	}
	if o.tunings {
		if err := printTunings(ctx, o, dir, slices.Max(callers)); err != nil {
			return err
		}
	}
	if o.maxP50 > 0 && worst > o.maxP50 {
		return fmt.Errorf("p50 with one caller is %.3f times that of doing nothing, at most %.2f is wanted", worst, o.maxP50)
	}
	return nil
}

func numbers(s string) ([]int, error) {
	var out []int
	for f := range strings.SplitSeq(s, ",") {
		n, err := strconv.Atoi(f)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q is no number above 0", f)
		}
		out = append(out, n)
	}
	return out, nil
}
