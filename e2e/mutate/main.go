// Command mutate tries to get mutated event logs past the gate: logs of real and
// simulated boots, changed at random in structure or in bytes, with quotes that match
// them or do not.
//
//	mutate [-logs N] [-seed S [-from I]]
//
// Each log goes through kleidi's own chain. attest.Verify checks the quote's signature,
// nonce and PCRs, parses both logs, replays them, and lets go-attestation do the same.
// Then bootpolicy.Judge judges with a boot policy recorded from the unmutated boot.
// Three logs of four enter the chain after the signature, in attest.VerifyLogs, with
// the values that would have been quoted.
//
// # The oracle
//
// A log may be accepted only if the ordered digests of the judged PCRs are those of the
// unmutated log, as this command's own reader finds them, and if the quoted values are
// those of the unmutated boot. Any other acceptance is false, and the command fails. It
// also fails if one log takes too long, or all of them too much memory.
//
// Half of the logs come from a fixed seed, so that two runs can be compared, and half
// from a seed that is new each time and is printed. With -seed all logs come from that
// seed, and -from begins at a later log, which repeats a failure.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Limits. A log of the largest size takes about a second, and a few on a busy machine.
const (
	maxTime   = 20 * time.Second
	maxMemory = 1 << 30 // bytes of the whole process
)

const fixedSeed = 20261121

func main() {
	logs := flag.Uint64("logs", 1_000_000, "how many logs to try")
	seed := flag.Uint64("seed", 0, "the seed of all logs; 0: a fixed one for half of them, and a new one")
	from := flag.Uint64("from", 0, "number of the first log")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, *logs, *seed, *from); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, logs, seed, from uint64) error {
	s, err := newSigner()
	if err != nil {
		return err
	}
	all, err := corpus(ctx, s)
	if err != nil {
		return err
	}
	c := &campaign{chain: real, signer: s, all: all}
	seeds := []uint64{seed}
	if seed == 0 {
		seeds = []uint64{fixedSeed, rand.Uint64()}
	}
	debug.SetGCPercent(400) // the program keeps little and allocates much
	begin := time.Now()
	for i, seed := range seeds {
		n := logs / uint64(len(seeds))
		if i == 0 {
			n += logs % uint64(len(seeds))
		}
		fmt.Printf("%d mutations of %d boots, seed %d\n", n, len(all), seed)
		if err := c.run(ctx, seed, from, n); err != nil {
			return err
		}
	}
	c.print()
	fmt.Printf("%d mutated logs in %s: %d accepted, each with the digests of its boot; slowest %s, memory %d MiB\n",
		c.tried, time.Since(begin).Round(time.Second), c.by[accepted], c.slowest.Round(time.Millisecond), memory()>>20)
	return c.check()
}

// memory is the largest amount that the process has used, in bytes.
func memory() int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return -1
	}
	return u.Maxrss << 10
}

// threadTime is the CPU time of this thread, which other programs don't prolong.
func threadTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// campaign is a number of mutated logs, with their results.
type campaign struct {
	chain  chain
	signer *signer
	all    []*source

	tally
}

type tally struct {
	tried   uint64
	by      map[stage]int
	kinds   map[string]map[stage]int // by mutation
	slowest time.Duration
}

func (t *tally) count(names []string, s stage, took time.Duration) {
	if t.by == nil {
		t.by, t.kinds = map[stage]int{}, map[string]map[stage]int{}
	}
	t.tried++
	t.by[s]++
	t.slowest = max(t.slowest, took)
	for _, name := range names {
		if t.kinds[name] == nil {
			t.kinds[name] = map[stage]int{}
		}
		t.kinds[name][s]++
	}
}

func (t *tally) add(o tally) {
	if t.by == nil {
		t.by, t.kinds = map[stage]int{}, map[string]map[stage]int{}
	}
	t.tried += o.tried
	t.slowest = max(t.slowest, o.slowest)
	for s, n := range o.by {
		t.by[s] += n
	}
	for name, by := range o.kinds {
		if t.kinds[name] == nil {
			t.kinds[name] = map[stage]int{}
		}
		for s, n := range by {
			t.kinds[name][s] += n
		}
	}
}

// run tries n logs from a number on. It does not matter which worker has which log.
func (c *campaign) run(ctx context.Context, seed, from, n uint64) error {
	workers := runtime.GOMAXPROCS(0)
	tallies, failures := make([]tally, workers), make([]error, workers)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := from + uint64(w); i < from+n && ctx.Err() == nil; i += uint64(workers) {
				if failures[w] = c.try(&tallies[w], seed, i); failures[w] != nil {
					cancel()
				}
			}
		})
	}
	wg.Wait()
	for w := range workers {
		c.add(tallies[w])
		if failures[w] != nil {
			return failures[w]
		}
	}
	return ctx.Err()
}

func (c *campaign) attempt(seed, i uint64) *attempt {
	return &attempt{dice: &dice{rand.New(rand.NewPCG(seed, i)), c.all}}
}

// try makes one log and asks the oracle.
func (c *campaign) try(t *tally, seed, i uint64) (err error) {
	a := c.attempt(seed, i)
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
		if err != nil {
			err = fmt.Errorf("%w; repeat it with -seed %d -from %d -logs 1", err, seed, i)
		}
	}()
	if err := a.make(c.signer); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	begin := threadTime()
	s := c.chain.run(a)
	t.count(a.applied, s, threadTime()-begin)
	if s == accepted {
		return a.oracle()
	}
	if s == unexpected {
		return fmt.Errorf("%s: the quote was refused, so the log was not tried", a)
	}
	return nil
}
