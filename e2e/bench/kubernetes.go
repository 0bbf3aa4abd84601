package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/tpm/simboot"
)

const (
	// apiserverCallers create and read Secrets at the same time.
	apiserverCallers = 4
	// apiserverSecrets are created, and then read, in each slice.
	apiserverSecrets = 400
	// apiserverWarm is the number of rounds before the counted ones.
	apiserverWarm = 3
)

// runAPIServer measures what users notice: creating and reading Secrets through a real
// kube-apiserver, with kleidi, with a plugin that does nothing, with a key in
// kube-apiserver's own configuration, and without encryption. All four run at the same
// time and are measured in turns.
func runAPIServer(ctx context.Context, o options, dir string) error {
	if o.kleidi == "" {
		return errors.New("-apiserver needs -kleidi")
	}
	all, stop, err := startAPIServers(ctx, o, dir)
	defer stop()
	if err != nil {
		return err
	}
	rounds := make([][]secretFigures, len(all))
	for i := range o.pairs + apiserverWarm {
		for _, k := range rand.Perm(len(all)) { // in a random order, so that each has the same share of every place
			f, err := all[k].slice(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", all[k].name, err)
			}
			if i >= apiserverWarm {
				rounds[k] = append(rounds[k], f)
			}
		}
	}
	if err := reportSecrets(o, all, rounds); err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(a *apiserver) bool { return a.name == "aescbc" })
	return all[i].migrations(ctx)
}

// stack holds the functions that stop the started programs, in the opposite order.
type stack []func()

func (s *stack) push(stop func()) { *s = append(*s, stop) }

func (s *stack) stop() {
	for _, f := range slices.Backward(*s) {
		f()
	}
}

func startAPIServers(ctx context.Context, o options, dir string) (all []*apiserver, stop func(), err error) {
	var running stack
	paths, err := built(ctx, "etcd", apiserverName)
	if err != nil {
		return nil, running.stop, err
	}
	sockets, err := startPlugins(ctx, o, dir, &running)
	if err != nil {
		return nil, running.stop, err
	}
	etcd, stopEtcd, err := startEtcd(ctx, paths[0], dir)
	if err != nil {
		return nil, running.stop, fmt.Errorf("etcd: %w", err)
	}
	running.push(stopEtcd)
	for _, c := range []struct{ name, provider string }{
		{"kleidi", kmsProvider(sockets[0])}, {"nothing", kmsProvider(sockets[1])}, {"aescbc", aescbcProvider()}, {"identity", identityProvider},
	} {
		a, err := startAPIServer(ctx, paths[1], etcd, dir, c.name, c.provider)
		if err != nil {
			return nil, running.stop, err
		}
		running.push(func() { a.stop() }) // stops the server that its last start made
		all = append(all, a)
	}
	return all, running.stop, nil
}

// startPlugins starts kleidi and a plugin that does nothing, and returns their sockets.
func startPlugins(ctx context.Context, o options, dir string, running *stack) (sockets [2]string, err error) {
	machine, err := simboot.New(filepath.Join(dir, "machine"))
	if err != nil {
		return sockets, err
	}
	running.push(func() { _ = machine.PowerOff() })
	if err := machine.Boot(ctx, simboot.Baseline(simboot.UKI)); err != nil {
		return sockets, err
	}
	k := newShipped(o.kleidi, machine, dir, "bench")
	config, err := k.configure("state", machine.Device())
	if err == nil {
		err = k.init(ctx, config)
	}
	if err != nil {
		return sockets, err
	}
	kleidi, _, err := k.serve(ctx, config)
	if err != nil {
		return sockets, err
	}
	running.push(kleidi.stop)
	nothing, err := startSelf(ctx, "serve-nothing", dir)
	if err != nil {
		return sockets, err
	}
	running.push(nothing.stop)
	return [2]string{kleidi.socket, nothing.socket}, nil
}

// secretFigures are the figures of one slice: per Secret, in µs.
type secretFigures struct{ created, read, createdTail, readTail, took, cpu float64 }

// slice creates Secrets and reads each of them.
func (a *apiserver) slice(ctx context.Context) (f secretFigures, err error) {
	first := a.made
	a.made += apiserverSecrets
	begin, before := time.Now(), time.Duration(0)
	if before, err = cpuTime(a.pid); err != nil {
		return f, err
	}
	for _, step := range []struct {
		call         func(context.Context, string) error
		median, tail *float64
	}{{a.create, &f.created, &f.createdTail}, {a.read, &f.read, &f.readTail}} {
		if *step.median, *step.tail, err = eachSecret(ctx, first, step.call); err != nil {
			return f, err
		}
	}
	after, err := cpuTime(a.pid)
	f.cpu = float64((after - before).Nanoseconds()) / 1e3 / apiserverSecrets
	f.took = float64(time.Since(begin).Nanoseconds()) / 1e3 / apiserverSecrets
	return f, err
}

// eachSecret calls f for each Secret of a slice and returns the median and the 99th
// percentile of the latencies in µs.
func eachSecret(ctx context.Context, first int, f func(context.Context, string) error) (p50, p99 float64, err error) {
	latencies := make([]time.Duration, apiserverSecrets)
	errs := make([]error, apiserverCallers)
	var wg sync.WaitGroup
	for caller := range apiserverCallers {
		wg.Go(func() {
			for i := caller; i < apiserverSecrets && errs[caller] == nil; i += apiserverCallers {
				begin := time.Now()
				errs[caller] = f(ctx, fmt.Sprintf("secret-%06d", first+i))
				latencies[i] = time.Since(begin)
			}
		})
	}
	wg.Wait()
	slices.Sort(latencies)
	at := func(q float64) float64 {
		return float64(latencies[int(q*float64(len(latencies)-1))].Nanoseconds()) / 1e3
	}
	return at(0.50), at(0.99), errors.Join(errs...)
}

// reportSecrets prints latencies as medians of the rounds, and the total cost of a
// Secret as a mean: kube-apiserver's garbage collector runs in some of the slices, and
// a median would only show in how many. Ratios are to the plugin that does nothing.
func reportSecrets(o options, all []*apiserver, rounds [][]secretFigures) error {
	latencies := []struct {
		name string
		of   func(secretFigures) float64
	}{
		{"create p50", func(f secretFigures) float64 { return f.created }},
		{"create p99", func(f secretFigures) float64 { return f.createdTail }},
		{"read p50", func(f secretFigures) float64 { return f.read }},
		{"read p99", func(f secretFigures) float64 { return f.readTail }},
	}
	const kleidi, nothing = 0, 1
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Printf("Secrets created and read through kube-apiserver, %d callers, %d rounds of %d Secrets in turns, load %s",
		apiserverCallers, o.pairs, apiserverSecrets, load)
	fmt.Printf("µs, and the ratio to doing nothing; for each Secret, the time and kube-apiserver's CPU, with a 95 %% interval of the ratio\n%-10s", "")
	for _, c := range latencies {
		fmt.Printf(" %15s", c.name)
	}
	fmt.Printf(" %28s %28s\n", "time", "CPU")
	for k, a := range all {
		fmt.Printf("%-10s", a.name)
		for _, c := range latencies {
			own, base := medianOfRounds(rounds[k], c.of), medianOfRounds(rounds[nothing], c.of)
			fmt.Printf(" %7.0f = %5.3f", own, own/base)
		}
		for _, of := range []func(secretFigures) float64{tookOf, cpuOf} {
			low, high := interval(rounds[k], rounds[nothing], of)
			fmt.Printf(" %7.0f = %5.3f (%5.3f-%5.3f)", meanOfRounds(rounds[k], of), meanOfRounds(rounds[k], of)/meanOfRounds(rounds[nothing], of), low, high)
		}
		fmt.Println()
	}
	ratio := meanOfRounds(rounds[kleidi], cpuOf) / meanOfRounds(rounds[nothing], cpuOf)
	if o.maxCPU > 0 && ratio > o.maxCPU {
		return fmt.Errorf("with kleidi kube-apiserver takes %.3f times the CPU, at most %.2f is wanted", ratio, o.maxCPU)
	}
	return nil
}

func tookOf(f secretFigures) float64 { return f.took }
func cpuOf(f secretFigures) float64  { return f.cpu }

func medianOfRounds(rounds []secretFigures, of func(secretFigures) float64) float64 {
	var values []float64
	for _, f := range rounds {
		values = append(values, of(f))
	}
	return middle(values)
}

func meanOfRounds(rounds []secretFigures, of func(secretFigures) float64) (mean float64) {
	for _, f := range rounds {
		mean += of(f) / float64(len(rounds))
	}
	return mean
}

// interval returns the range of the ratio of two means in 95 of 100 samples of the
// rounds, each sample as large as the rounds themselves (a bootstrap).
func interval(a, b []secretFigures, of func(secretFigures) float64) (low, high float64) {
	const samples = 2000
	ratios := make([]float64, samples)
	for i := range ratios {
		var sums [2]float64
		for range a {
			r := rand.IntN(len(a))
			sums[0] += of(a[r])
			sums[1] += of(b[r])
		}
		ratios[i] = sums[0] / sums[1]
	}
	slices.Sort(ratios)
	return ratios[samples*25/1000], ratios[samples*975/1000]
}
