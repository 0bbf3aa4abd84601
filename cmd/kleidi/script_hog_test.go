package main

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// hogs is how many peers hog plays: more than a verifier takes in without a proof.
const hogs = 400

// hog plays silent peers, each of an address of its own, that connect again whenever
// they are cut off: hog ADDRESS, until hog -stop. Some of them speak TLS first.
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
