package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// Peers that occupy resources that others need.

// hogs is the number of peers that hog plays: more than a verifier accepts without a
// proof.
const hogs = 400

// hog plays silent peers, each with a separate address, that connect again whenever
// they are cut off: hog ADDRESS, until hog -stop. Some of them first speak TLS.
func (h *host) hog(_ *testscript.TestScript, args []string) error {
	if args[0] == "-stop" {
		h.stopHog()
		return nil
	}
	ctx, cancel := context.WithCancel(h.t.Context())
	var running sync.WaitGroup
	h.stopHog = sync.OnceFunc(func() { cancel(); running.Wait() })
	h.t.Cleanup(h.stopHog)
	var held sync.WaitGroup
	held.Add(hogs)
	for i := range hogs {
		running.Go(func() {
			first := sync.OnceFunc(held.Done)
			for ctx.Err() == nil {
				hold(ctx, args[0], net.IPv4(127, 30, byte(i>>8), byte(i)), i%4 == 0, first)
			}
			first()
		})
	}
	held.Wait()
	return nil
}

// hold holds one connection until the other side ends it.
func hold(ctx context.Context, address string, from net.IP, speaksTLS bool, held func()) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}, Timeout: waitTimeout}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		held()
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond): // the verifier may be down
		}
		return
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if speaksTLS {
		secured := tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		_ = secured.HandshakeContext(ctx)
	}
	held()
	_, _ = c.Read(make([]byte, 1))
}

// flood makes many local clients hold connections to health and metrics. Each sends a
// request from time to time, and connects again whenever it is cut off: flood NETWORK
// ADDRESS, until flood -stop.
func (h *host) flood(_ *testscript.TestScript, args []string) error {
	if args[0] == "-stop" {
		h.stopHog()
		return nil
	}
	const clients = 600
	ctx, cancel := context.WithCancel(h.t.Context())
	var running, held sync.WaitGroup
	h.stopHog = sync.OnceFunc(func() { cancel(); running.Wait() })
	h.t.Cleanup(h.stopHog)
	held.Add(clients)
	for range clients {
		running.Go(func() {
			first := sync.OnceFunc(held.Done)
			for ctx.Err() == nil {
				keepAlive(ctx, args[0], args[1])
				first()
				select {
				case <-ctx.Done():
				case <-time.After(20 * time.Millisecond):
				}
			}
			first()
		})
	}
	held.Wait()
	return nil
}

// keepAlive holds one connection, and sends requests on it for as long as it can.
func keepAlive(ctx context.Context, network, address string) {
	d := net.Dialer{Timeout: waitTimeout}
	c, err := d.DialContext(ctx, network, address)
	if err != nil {
		return
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	for err == nil {
		if _, err = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: kleidi\r\n"); err == nil {
			_, err = c.Read(make([]byte, 1))
		}
	}
}

// footprint records the memory and the files of serve, or demands that they have grown
// by no more than this since: footprint, then footprint KIB FILES.
func (h *host) footprint(ts *testscript.TestScript, args []string) error {
	proc := fmt.Sprintf("/proc/%d/", h.server.cmd.Process.Pid)
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		return broken("%w", err)
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(status)
	files, err := os.ReadDir(proc + "fd")
	if err != nil || m == nil {
		return broken("%w", err)
	}
	rss, _ := strconv.Atoi(string(m[1]))
	fmt.Fprintf(ts.Stdout(), "%d KiB, %d files\n", rss, len(files))
	if len(args) == 0 {
		h.before = [2]int{rss, len(files)}
		return nil
	}
	for i, now := range []int{rss, len(files)} {
		limit, err := strconv.Atoi(args[i])
		if err != nil {
			return broken("%w", err)
		}
		if grown := now - h.before[i]; grown > limit {
			return fmt.Errorf("grown by %d, %d at most", grown, limit)
		}
	}
	return nil
}
