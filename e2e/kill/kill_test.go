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

	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// verb is a change of the keyring, and what the machine is like before it.
type verb struct {
	name string
	args string // DIR stands for the machine's folder
	// prepare makes the machine that the verb is run on, of one that holds two
	// KEKs, and returns what it is to boot.
	prepare func(*machine) simboot.Boot
	// config is added to the machine's configuration.
	config string
	// closed says that the keyring does not open before the verb has saved one.
	closed bool
	// over is how the verb says that there is nothing left to do.
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

// anchorInTPM has the node keep its anchor at anchorIndex.
const (
	anchorInTPM = "anchor: {store: tpm}\n"
	anchorIndex = 0x01804B02
)

// signedStates has an operator sign the boot of the machine.
func signedStates(m *machine) simboot.Boot {
	m.Reboot(usual)
	m.exec("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", m.path("operator.pem"))
	m.exec("openssl", "pkey", "-in", m.path("operator.pem"), "-pubout", "-out", m.path("operator.pub"))
	m.run("bootstate sign --key DIR/operator.pem --cluster-id " + m.cluster() + " --event-log " + m.EventLog() + " --out DIR/states.json")
	return usual
}

func asItIs(*machine) simboot.Boot { return usual }

// scene is a verb on a machine that can be put back to before it.
type scene struct {
	verb
	*machine
	start   snapshot
	history *history // of start
	dirty   bool     // the machine is no longer as start is
}

// set makes the machine: an initialised node with a retired KEK, and a seed under
// each.
func set(t *testing.T, v verb) *scene {
	t.Helper()
	m := newMachine(t)
	m.configure(v.config)
	recipient := m.identity()
	m.Reboot(usual)
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
	if strings.HasPrefix(v.name, "init") {
		h = newHistory()
	}
	v.args = strings.ReplaceAll(v.args, "RECIPIENT", recipient)
	return &scene{verb: v, machine: m, start: m.off(boot), history: h, dirty: true}
}

// ready puts the machine back where that is needed.
func (s *scene) ready() {
	s.t.Helper()
	if s.dirty {
		s.restore(s.start)
		s.dirty = false
	}
}

// state reads the state folder, less the lock, which every process writes.
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

// saved reports whether the stored keyring is another than before the verb.
func (s *scene) saved() bool {
	s.t.Helper()
	now := s.state()["keyring.json"]
	return now != nil && !bytes.Equal(now, s.start.files["state/keyring.json"])
}

// opens proves that the keyring opens with all its KEKs. Where it did not open
// before, it need not before the verb has saved one, but no other cause may have
// come up.
func (s *scene) opens(h *history) bool {
	s.t.Helper()
	if s.closed && !s.saved() {
		return false
	}
	s.run("keyring verify") // opens every retired KEK too
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

// again runs the verb to its end, unless it says that the killed one came so far
// that there is nothing left to do.
func (s *scene) again() {
	s.t.Helper()
	saved := s.saved()
	_, err := s.try(s.args)
	if err != nil && !(saved && s.over != "" && strings.Contains(err.Error(), s.over)) {
		s.t.Errorf("the verb, run again: %v", err)
	}
}

// clean proves that nothing is left lying about.
func (s *scene) clean() {
	s.t.Helper()
	for name := range s.state() {
		switch name {
		case "keyring.json", "keyring.json.previous", "anchor.json", "anchor.json.previous", "bootstates.json", "bootstates.json.previous":
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

// complete proves that no step went without a kill: the kills are as many as the
// steps of the run that was left alone.
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
	// serve may have asked its TPM for something else as well
	k, want = maps.Clone(k), maps.Clone(want)
	delete(k, "TPM")
	delete(want, "TPM")
	if !maps.Equal(k, want) {
		t.Errorf("killed before %v, the run that was left alone has %v", k, want)
	}
}

// sweep runs a verb again and again, each time killed one step later, until it
// completes.
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

// TestKilled kills the command itself, which changes the keyring where no serve runs.
func TestKilled(t *testing.T) {
	table := newTable(t)
	for _, v := range verbs {
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
	case !killed && !ok:
		s.t.Errorf("kleidi %s: %s", s.args, p.said())
	case !killed || s.touched(before, steps):
		s.check(who.n, killed)
	default:
		s.opens(s.history)
	}
	return steps, killed
}

// check looks at what a run left, and ends with the machine changed. Every other
// time serve is the first to find it, else the verb is run again at once.
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

// trail is the last steps, for people.
func trail(steps []step) string {
	var out []string
	for _, s := range steps[max(0, len(steps)-12):] {
		out = append(out, s.String())
	}
	return strings.Join(out, ", ")
}

// TestServeKilled kills serve, which changes the keyring when it is asked over
// the admin socket, while a client notes every key ID that it announces.
func TestServeKilled(t *testing.T) {
	table := newTable(t)
	for _, v := range verbs {
		if strings.HasPrefix(v.name, "init") {
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

// askServe runs serve, asks it for the verb and kills it before a step.
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

// pollUntil polls until it is stopped or serve has ended.
func (c *client) pollUntil(ctx context.Context, p *traced) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(5 * time.Millisecond) // more would keep serve from anything else
		defer tick.Stop()
		for ctx.Err() == nil && p.alive() == nil {
			_ = c.poll(ctx) // that it fails while locked, or is cut short, is expected
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

// checkServe has serve go on from what a killed one left.
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
