package kill

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// verb is a change of the keyring, and the state of the machine before it.
type verb struct {
	name string
	args string // DIR stands for the machine's folder
	// prepare turns a machine with two KEKs into the machine for the verb, and returns
	// the boot in which the verb runs.
	prepare func(*machine) simboot.Boot
	// config is added to the machine's configuration.
	config string
	// closed says that the keyring opens only after the verb has saved one.
	closed bool
	// asked says that only a running serve can do it.
	asked bool
	// over is the verb's message that nothing is left to do.
	over string
}

var (
	usual = simboot.Baseline(simboot.UKI)
	other = func() simboot.Boot { b := usual; b.Kernel = "6.13.1"; return b }()
)

var verbs = []verb{
	{name: "init", args: "init --recovery-recipient RECIPIENT", closed: true, over: "never replaces a keyring", prepare: func(m *machine) simboot.Boot {
		m.remove("state")
		return usual
	}},
	{name: "rotate", args: "rotate", prepare: asItIs},
	{name: "reseal", args: "reseal", prepare: asItIs},
	{name: "suspend", args: "suspend", prepare: asItIs},
	{name: "bootstate add", args: "bootstate add DIR/states.json --public-key DIR/operator.pub", prepare: signedStates},
	{name: "init with the anchor in the TPM", config: anchorInTPM, args: "init --anchor tpm --recovery-recipient RECIPIENT", closed: true, over: "never replaces a keyring", prepare: func(m *machine) simboot.Boot {
		m.remove("state")
		m.undefine(anchorIndex)
		return usual
	}},
	{name: "node approve", args: approveTwo, prepare: recordedPolicy, config: "join: {listen: " + loopback(9782) + "}\n", asked: true},
	{name: "rotate in format 2", args: "rotate", prepare: inFormat2(usual), config: "join: {listen: " + loopback(9783) + "}\n"},
	{name: "recover in format 2", args: "recover --identity-file DIR/recovery.txt", closed: true, prepare: inFormat2(other), config: "join: {listen: " + loopback(9784) + "}\n"},
	{name: "join", args: "JOIN", closed: true, prepare: joining},
	{name: "rotate with the anchor in the TPM", config: anchorInTPM, args: "rotate", prepare: asItIs},
	{name: "recover", args: "recover --identity-file DIR/recovery.txt", closed: true,
		prepare: func(*machine) simboot.Boot { return other }},
	{name: "restore previous", args: "keyring restore --previous", prepare: asItIs},
	{name: "restore damaged", args: "keyring restore --previous", closed: true, prepare: func(m *machine) simboot.Boot {
		m.write("state/keyring.json", "damaged")
		return usual
	}},
	{name: "restore lost", args: "keyring restore DIR/backup.json", closed: true, over: "restore a newer keyring", prepare: func(m *machine) simboot.Boot {
		m.remove("state/keyring.json")
		return usual
	}},
}

// anchorInTPM makes the node keep its anchor at anchorIndex.
const (
	anchorInTPM = "anchor: {store: tpm}\n"
	anchorIndex = 0x01804B02
)

// signedStates signs the boot of the machine with an operator's key.
func signedStates(m *machine) simboot.Boot {
	m.Reboot(usual)
	m.exec("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", m.path("operator.pem"))
	m.exec("openssl", "pkey", "-in", m.path("operator.pem"), "-pubout", "-out", m.path("operator.pub"))
	m.run("bootstate sign --key DIR/operator.pem --cluster-id " + m.cluster() + " --event-log " + m.EventLog() + " --out DIR/states.json")
	return usual
}

func asItIs(*machine) simboot.Boot { return usual }

// scene is a verb on a machine that can be reset to the state before the verb.
type scene struct {
	verb
	*machine
	start   snapshot
	history *history // of start
	dirty   bool     // the machine has changed since start
	retries int      // of joins that the seat cut off
}

// set makes the machine: an initialised node with a retired KEK, and a seed under each
// KEK.
func set(t *testing.T, v verb) *scene {
	t.Helper()
	m := newMachine(t)
	m.configure(v.config)
	recipient := m.identity()
	m.Reboot(usual)
	if v.name != "init" { // one verb stays on a TPM that keeps no endorsement key
		m.keepEK()
	}
	h := newHistory()
	m.run("init --recovery-recipient " + recipient)
	m.serving(h, func() {})
	m.run("rotate")
	m.serving(h, func() {})
	m.run("keyring backup DIR/backup.json")
	m.write("backup.json", string(m.files("")["backup.json"]))
	if err := m.PowerOff(); err != nil {
		t.Fatal(err)
	}
	boot := v.prepare(m)
	if strings.HasPrefix(v.name, "init") || m.approve != nil {
		h = newHistory()
	}
	if m.approve != nil {
		v.args = strings.ReplaceAll(v.args, "JOIN", m.approve())
	}
	v.args = strings.ReplaceAll(v.args, "RECIPIENT", recipient)
	return &scene{verb: v, machine: m, start: m.off(boot), history: h, dirty: true}
}

// ready resets the machine if necessary.
func (s *scene) ready() {
	s.t.Helper()
	if s.dirty {
		s.restore(s.start)
		if s.approve != nil {
			s.approve() // one join spends an approval
		}
		s.dirty = false
	}
}

// state reads the state folder without the lock, which every process writes.
func (s *scene) state() map[string][]byte {
	s.t.Helper()
	if _, err := os.Stat(s.stateDir()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	files := s.files("state")
	delete(files, "lock")
	return files
}

// touched reports whether a killed run has changed disk or TPM.
func (s *scene) touched(before map[string][]byte, steps []step) bool {
	s.t.Helper()
	for _, done := range steps[:len(steps)-1] {
		if slices.Contains(lasting, done) {
			return true
		}
	}
	return !maps.EqualFunc(before, s.state(), bytes.Equal)
}

// saved reports whether the stored keyring has changed since before the verb.
func (s *scene) saved() bool {
	s.t.Helper()
	now := s.state()["keyring.json"]
	return now != nil && !bytes.Equal(now, s.start.files["state/keyring.json"])
}

// opens proves that the keyring opens with all its KEKs. If it did not open before, it
// need not open until the verb has saved one, but the cause must be the same as before.
func (s *scene) opens(h *history) bool {
	s.t.Helper()
	if s.closed && !s.saved() {
		return false
	}
	s.run("keyring verify") // this also opens every retired KEK
	shown, status := s.show(), s.status()
	if status.CurrentKeyID != shown.Current.KeyID {
		s.t.Errorf("status names %s as the current key ID, the keyring %s", status.CurrentKeyID, shown.Current.KeyID)
	}
	for _, id := range h.clone().announced {
		if !slices.Contains(shown.ids(), id) {
			s.t.Errorf("key ID %s was announced and is forgotten; the keyring holds %v", id, shown.ids())
		}
	}
	return true
}

// again runs the verb to its end, unless the verb says that the killed run left nothing
// to do.
func (s *scene) again() {
	s.t.Helper()
	saved := s.saved()
	if err := s.do(); err != nil && !(saved && s.over != "" && strings.Contains(err.Error(), s.over)) {
		s.t.Errorf("the verb, run again: %v", err)
	}
}

// do runs the verb, beside a serve if only a serve can do it. A join that the seat cuts off
// has spent nothing, and is run again: the seat gives a peer 3 s for its hello and 15 s for
// its proof, and notices only a moment later that a killed join has broken off.
func (s *scene) do() error {
	s.t.Helper()
	if s.asked {
		defer s.background()()
	}
	_, err := s.try(s.args)
	for deadline := time.Now().Add(patience); s.approve != nil && cutOff(err) && time.Now().Before(deadline); {
		_, err = s.try(s.args)
	}
	return err
}

// cutOff reports whether a join failed for a reason that a busy machine may cause.
func cutOff(err error) bool {
	return err != nil && node.HasOneOf(err.Error(), node.JoinAgain)
}

// clean proves that no temporary files are left.
func (s *scene) clean() {
	s.t.Helper()
	for name := range s.state() {
		switch name {
		case "ak.json", "audit.log", "keyring.json", "keyring.json.previous", "anchor.json", "anchor.json.previous", "bootstates.json", "bootstates.json.previous", "slots.json", "slots.json.previous":
		default:
			s.t.Errorf("%s is left in the state folder", name)
		}
	}
}

// tally counts kills by series.
type tally map[string]int

func (k tally) total() (n int) {
	for _, c := range k {
		n += c
	}
	return n
}

// complete proves that the tests killed at every step: there are as many kills as steps
// in the run that was not killed.
func (k tally) complete(t *testing.T, steps []step) {
	t.Helper()
	want := tally{}
	for _, s := range steps {
		want[s.series]++
	}
	for _, series := range []string{"create", "write", "flush", "rename", "TPM"} {
		if want[series] == 0 {
			t.Errorf("no step of series %s was seen; are system calls still recognised?", series)
		}
	}
	// serve may have sent other commands to its TPM as well
	k, want = maps.Clone(k), maps.Clone(want)
	delete(k, "TPM")
	delete(want, "TPM")
	if !maps.Equal(k, want) {
		t.Errorf("killed before %v, the run that was left alone has %v", k, want)
	}
}

// sweep runs a verb repeatedly, each time killed one step later, until it completes.
func sweep(t *testing.T, table *table, v verb, by string, groups []group, once func(*scene, victim) (steps []step, killed bool)) {
	t.Parallel()
	s := set(t, v)
	kills := tally{}
	var steps []step
	for _, g := range groups {
		for n, killed := 1, true; killed; n++ {
			who := victim{g, n}
			steps, killed = once(s, who)
			if killed {
				kills[steps[len(steps)-1].series]++
			}
			if t.Failed() {
				t.Fatalf("killed: %v, before %v, after %s", killed, who, trail(steps))
			}
		}
	}
	kills.complete(t, steps)
	table.add(v.name, by, kills)
}

// TestKilled kills the command itself, which changes the keyring if no serve runs.
func TestKilled(t *testing.T) {
	table := newTable(t)
	for _, v := range verbs {
		if v.asked {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			sweep(t, table, v, "command", []group{onDisk, inTPM}, (*scene).runKilled)
		})
	}
}

func (s *scene) runKilled(who victim) ([]step, bool) {
	s.t.Helper()
	s.ready()
	before := s.state()
	p := trace(s.t, s.stateDir(), s.path("output"), who, s.command(s.args))
	ok := p.wait()
	steps, killed := p.reached()
	switch {
	case !killed && !ok && s.approve != nil && s.retries < 3 && strings.Contains(p.said(), "check that kleidi serve runs there"): // the seat gives a traced join 3 s to say hello
		s.retries, s.dirty = s.retries+1, true
		return s.runKilled(who)
	case !killed && !ok:
		s.t.Errorf("kleidi %s: %s", s.args, p.said())
	case !killed || s.touched(before, steps):
		s.check(who.n, killed)
	default:
		s.opens(s.history)
	}
	return steps, killed
}

// check examines the result of a run, and leaves the machine changed. Every other time
// serve is the first to find that result; otherwise the verb runs again at once.
func (s *scene) check(n int, killed bool) {
	s.t.Helper()
	s.dirty = true
	h := s.history.clone()
	if s.opens(h) && n%2 == 0 {
		s.serving(h, func() {})
	}
	if killed {
		s.again()
	}
	if !s.opens(h) {
		s.t.Error("the keyring does not open")
	}
	s.clean()
	s.serving(h, func() {})
}

// trail returns the last steps, for display.
func trail(steps []step) string {
	var out []string
	for _, s := range steps[max(0, len(steps)-12):] {
		out = append(out, s.String())
	}
	return strings.Join(out, ", ")
}

// TestServeKilled kills serve, which changes the keyring on a request over the admin
// socket, while a client records every key ID that serve announces.
func TestServeKilled(t *testing.T) {
	table := newTable(t)
	for _, v := range verbs {
		if strings.HasPrefix(v.name, "init") || v.name == "join" {
			continue // serve never makes a keyring
		}
		t.Run(v.name, func(t *testing.T) {
			var h *history
			sweep(t, table, v, "serve", []group{onDisk, inNV}, func(s *scene, who victim) ([]step, bool) {
				if s.dirty {
					h = s.history.clone()
				}
				s.ready()
				before := s.state()
				steps, killed := s.askServe(h, who)
				if !killed || s.touched(before, steps) {
					s.checkServe(h, killed)
				}
				return steps, killed
			})
		})
	}
}

// askServe runs serve, requests the verb, and kills serve before a step.
func (s *scene) askServe(h *history, who victim) ([]step, bool) {
	s.t.Helper()
	p := trace(s.t, s.stateDir(), s.path("serve.log"), victim{}, s.command("serve"))
	c := s.client(h)
	defer c.conn.Close()
	if s.closed && !s.saved() {
		s.waitLocked(p)
	} else {
		s.waitOpen(c, p)
	}
	if strings.Contains(s.more, "join:") { // which begins with steps on the disk, on a goroutine of its own
		eventually(s.t, "serve listens for joining nodes", func() error {
			if !strings.Contains(p.said(), "listening for joining nodes") {
				return errors.New(p.said())
			}
			return nil
		})
	}
	p.arm(who)
	stop := c.pollUntil(s.t.Context(), p)
	_, err := s.try(s.args)
	steps, killed := p.reached()
	if err != nil && !killed {
		s.t.Fatalf("serve was not killed: %v\n%s", err, p.said())
	}
	stop()
	p.signal(unix.SIGTERM)
	p.wait()
	return steps, killed
}

// pollUntil polls until stop is called or serve has ended.
func (c *client) pollUntil(ctx context.Context, p *traced) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(5 * time.Millisecond) // polling more often would keep serve from other work
		defer tick.Stop()
		for ctx.Err() == nil && p.alive() == nil {
			_ = c.poll(ctx) // it may fail while serve is locked, or be cut short
			<-tick.C
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}

// waitLocked returns when serve has tried to open the keyring.
func (s *scene) waitLocked(p *traced) {
	s.t.Helper()
	s.waitAdmin(p)
	eventually(s.t, "serve is locked", func() error {
		out, err := s.try("status -o json --quick")
		if err == nil && (!bytes.Contains(out, []byte(`"locked"`)) || bytes.Contains(out, []byte(`"starting"`))) {
			err = errors.New(string(out))
		}
		return err
	})
}

// checkServe starts serve on the state that a killed serve left.
func (s *scene) checkServe(h *history, killed bool) {
	s.t.Helper()
	s.dirty = true
	if !s.opens(h) {
		s.again()
		killed = false
	}
	s.serving(h, func() {
		if killed {
			s.again()
		}
	})
	if !s.opens(h) {
		s.t.Error("the keyring does not open")
	}
	s.clean()
	s.serving(h, func() {})
}

func (m *machine) remove(name string) {
	m.t.Helper()
	if err := os.RemoveAll(filepath.Join(m.Dir(), name)); err != nil {
		m.t.Fatal(err)
	}
}
