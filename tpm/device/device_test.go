package device_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// newProxy returns a booted machine and a proxy in front of its TPM.
func newProxy(t *testing.T) (*tpmtest.Machine, *tpmtest.Proxy) {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	return m, tpmtest.NewProxy(t, m)
}

// getRandom is an operation of one command.
func getRandom(tp transport.TPM) error {
	r, err := tpm2.GetRandom{BytesRequested: 16}.Execute(tp)
	if err == nil && len(r.RandomBytes.Buffer) != 16 {
		return errors.New("16 random bytes asked for, other came")
	}
	return err
}

// wantUnavailable demands the typed cause and a hint.
func wantUnavailable(t *testing.T, err error, parts ...string) {
	t.Helper()
	if got := seal.CauseOf(err); got != seal.CauseUnavailable {
		t.Errorf("%v: cause %q, want %q", err, got, seal.CauseUnavailable)
		return
	}
	for _, part := range append(parts, "tries again") {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
}

func TestDoRetries(t *testing.T) {
	_, p := newProxy(t)
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate} {
		p.Forget()
		p.Inject(tpmtest.Fault{On: tpm2.TPMCCGetRandom, Times: 3, Do: tpmtest.Code(rc)})
		if err := p.TPM(0).Do(t.Context(), getRandom); err != nil {
			t.Errorf("%v three times: %v", rc, err)
		}
		if n := p.Count(tpm2.TPMCCGetRandom); n != 4 {
			t.Errorf("%v three times: the command was sent %d times, want 4", rc, n)
		}
	}
}

func TestDoRetriesUntilTheDeadline(t *testing.T) {
	_, p := newProxy(t)
	p.Inject(tpmtest.Fault{On: tpm2.TPMCCGetRandom, Do: tpmtest.Code(tpm2.TPMRCRetry)})
	err := p.TPM(3*time.Second).Do(t.Context(), getRandom)
	wantUnavailable(t, err, "deadline")
	if !errors.Is(err, tpm2.TPMRCRetry) {
		t.Errorf("%v hides the response code", err)
	}
}

// TestDoReturnsTheTPMsErrors: a refusal by the TPM is not retried, and is not a fault
// of the device.
func TestDoReturnsTheTPMsErrors(t *testing.T) {
	_, p := newProxy(t)
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCLockout, tpm2.TPMRCPCRChanged, tpm2.TPMRCFailure, tpm2.TPMRCObjectMemory} {
		p.Forget()
		p.Inject(tpmtest.Fault{On: tpm2.TPMCCGetRandom, Do: tpmtest.Code(rc)})
		err := p.TPM(0).Do(t.Context(), getRandom)
		if !errors.Is(err, rc) || seal.CauseOf(err) != "" {
			t.Errorf("%v: %v (cause %q)", rc, err, seal.CauseOf(err))
		}
		if n := p.Count(tpm2.TPMCCGetRandom); n != 1 {
			t.Errorf("%v: the command was sent %d times", rc, n)
		}
	}
}

// TestDoEndsWithAHangingTPM: the device's own timeout, the caller's deadline and
// the caller's cancellation each end an operation, and the device works on.
func TestDoEndsWithAHangingTPM(t *testing.T) {
	_, p := newProxy(t)
	const timeout = 10 * time.Second // a busy machine opens the TPM and sends the command in less
	for name, action := range map[string]tpmtest.Action{"before": tpmtest.Hang, "after": tpmtest.HangAfter} {
		t.Run(name, func(t *testing.T) {
			p.Inject(tpmtest.Fault{On: tpm2.TPMCCGetRandom, Do: action})
			wantUnavailable(t, p.TPM(timeout).Do(t.Context(), getRandom), "no answer", "another program")

			d := p.TPM(0)
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			wantUnavailable(t, d.Do(ctx, getRandom), "no answer", "another program")

			ctx, cancel = context.WithCancel(t.Context())
			p.Inject(tpmtest.Fault{On: tpm2.TPMCCGetRandom, Do: func(c []byte, send func() []byte) []byte {
				cancel()
				return action(c, send)
			}})
			err := d.Do(ctx, getRandom)
			wantUnavailable(t, err)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%v does not tell the cancellation", err)
			}
			p.Heal()
			if err := d.Do(t.Context(), getRandom); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// TestDoSurvivesGarbage: no answer ends the process, in the operation itself or before
// it in Do. An answer that can't be a response is the device's fault.
func TestDoSurvivesGarbage(t *testing.T) {
	_, p := newProxy(t)
	d := p.TPM(2 * time.Minute)
	for name, garbage := range tpmtest.Garbage() {
		for _, code := range []tpm2.TPMCC{tpm2.TPMCCGetRandom, tpm2.TPMCCGetCapability} {
			p.Inject(tpmtest.Fault{On: code, Do: tpmtest.Raw(garbage.Answer)})
			err := d.Do(t.Context(), getRandom)
			if garbage.Framed && code == tpm2.TPMCCGetRandom {
				if err == nil {
					t.Errorf("%s to %v is accepted", name, code)
				}
				continue
			}
			wantUnavailable(t, err)
		}
	}
	p.Heal()
	if err := d.Do(t.Context(), getRandom); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestDoWithTruncatedAnswers(t *testing.T) {
	_, p := newProxy(t)
	for _, n := range []int{0, 1, 9, 10, 11} {
		p.Inject(tpmtest.Fault{On: tpm2.TPMCCGetRandom, Do: tpmtest.Truncate(n)})
		wantUnavailable(t, p.TPM(2*time.Minute).Do(t.Context(), getRandom), "read a response")
	}
}

// TestDoSendsNothingAfterAFault: on a broken connection, the next answer could belong
// to an earlier command.
func TestDoSendsNothingAfterAFault(t *testing.T) {
	_, p := newProxy(t)
	p.Inject(tpmtest.Fault{On: tpm2.TPMCCGetRandom, Times: 1, Do: tpmtest.Truncate(11)})
	err := p.TPM(2*time.Minute).Do(t.Context(), func(tp transport.TPM) error {
		if err := getRandom(tp); err == nil {
			t.Error("a truncated answer is accepted")
		}
		return getRandom(tp)
	})
	wantUnavailable(t, err)
	if n := p.Count(tpm2.TPMCCGetRandom); n != 1 {
		t.Errorf("%d commands were sent", n)
	}
}

func TestDoWithoutTPM(t *testing.T) {
	m, p := newProxy(t)
	d := p.TPM(2 * time.Minute)
	err := d.Do(t.Context(), func(tp transport.TPM) error {
		p.Vanish()
		return getRandom(tp)
	})
	wantUnavailable(t, err, "check that swtpm runs")
	wantUnavailable(t, d.Do(t.Context(), getRandom), "check that swtpm runs", p.Address())
	p.Return()
	if err := d.Do(t.Context(), getRandom); err != nil {
		t.Errorf("after it came back: %v", err)
	}
	m.CutPower()
	wantUnavailable(t, d.Do(t.Context(), getRandom))
	m.Reboot(m.Current())
	if err := d.Do(t.Context(), getRandom); err != nil {
		t.Errorf("after a reboot: %v", err)
	}
	none := tpmtest.Device(t, filepath.Join(t.TempDir(), "tpmrm0"), 0)
	wantUnavailable(t, none.Do(t.Context(), getRandom), "tpm.device", "firmware")
}

// TestDoOpensForAnOperationOnly: between operations another client gets the TPM,
// though swtpm serves one at a time.
func TestDoOpensForAnOperationOnly(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	first, second := m.TPM(), m.TPM()
	for range 3 {
		for _, d := range []*device.Device{first, second} {
			if err := d.Do(t.Context(), getRandom); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestDoSerialises: operations of one device never overlap, also while the TPM
// answers slowly.
func TestDoSerialises(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	d := m.TPM()
	var running, most atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			err := d.Do(t.Context(), func(tp transport.TPM) error {
				now := running.Add(1)
				defer running.Add(-1)
				most.Store(max(most.Load(), now))
				return getRandom(tp)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d operations ran at once", most.Load())
	}
}

// TestDoWaitsItsTurnNotForever: an operation that waits for another one ends with its
// context, and says what it waited for.
func TestDoWaitsItsTurnNotForever(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	d := m.TPM()
	err := d.Do(t.Context(), func(tp transport.TPM) error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		wantUnavailable(t, d.Do(ctx, getRandom), "wait for an earlier TPM operation")
		return getRandom(tp)
	})
	if err != nil {
		t.Error(err)
	}
}

// TestDoSurvivesAPanic: a panic over an answer does not end the process or keep the
// TPM, and the message does not show the value.
func TestDoSurvivesAPanic(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	d := m.TPM()
	err := d.Do(t.Context(), func(transport.TPM) error { panic("hunter2") })
	wantUnavailable(t, err)
	if strings.Contains(err.Error(), "hunter2") {
		t.Errorf("%v shows the panic's value", err)
	}
	if err := d.Do(t.Context(), getRandom); err != nil {
		t.Error(err)
	}
}

// TestDoFlushesWhatAKilledClientLeft: a swtpm has room for three transient objects and
// three sessions. A killed client leaves its own there.
func TestDoFlushesWhatAKilledClientLeft(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	fill := func() {
		c, err := net.Dial("unix", strings.TrimPrefix(m.Device(), "unix:"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		tp := nodetest.Plain{Conn: c}
		for range 3 {
			if _, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}).Execute(tp); err != nil {
				t.Fatal(err)
			}
			if _, _, err := tpm2.PolicySession(tp, tpm2.TPMAlgSHA256, 16); err != nil {
				t.Fatal(err)
			}
		}
		_, err = tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(tp)
		if !errors.Is(err, tpm2.TPMRCObjectMemory) {
			t.Fatalf("the TPM is not full: %v", err)
		}
	}
	fill()
	d := m.TPM()
	for range 4 {
		err := d.Do(t.Context(), func(tp transport.TPM) error {
			if _, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}).Execute(tp); err != nil {
				return err
			}
			_, _, err := tpm2.PolicySession(tp, tpm2.TPMAlgSHA256, 16) // both are left for the next Do
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// TestTheResponseIsCleared: a response may hold a key, so its buffer is cleared
// when the operation goes on, and when it ends.
func TestTheResponseIsCleared(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	command := []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 16} // TPM2_GetRandom of 16 bytes
	var first, second []byte
	err := m.TPM().Do(t.Context(), func(tp transport.TPM) (err error) {
		if first, err = tp.Send(command); err != nil {
			return err
		}
		if len(first) != 28 {
			t.Errorf("%d bytes came", len(first))
		}
		second, err = tp.Send(command)
		if !bytes.Equal(first, make([]byte, len(first))) {
			t.Error("the next command leaves the response")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(second, make([]byte, len(second))) {
		t.Error("the end of the operation leaves the response")
	}
}

func TestParseAddress(t *testing.T) {
	for _, good := range []string{"/dev/tpmrm0", "/dev/tpm0", "unix:/run/swtpm.sock", "tcp:localhost:2321", "tcp:[::1]:2321"} {
		a, err := device.ParseAddress(good)
		if err != nil || a.String() != good {
			t.Errorf("%q: %q, %v", good, a, err)
		}
	}
	for _, bad := range []string{"", "tpmrm0", "unix:", "unix:tpm.sock", "unix:@abstract", "tcp:", "tcp:2321", "tcp:localhost:", "tcp::2321", "http://tpm"} {
		if a, err := device.ParseAddress(bad); err == nil {
			t.Errorf("%q is read as %q", bad, a)
		}
	}
}
