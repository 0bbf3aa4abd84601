package docs

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal/store/kube/kubetest"
)

// Scenes of several machines. A comment in the document names the machine for its
// commands.

const (
	theSeat       = "the seat"
	theNewMachine = "the new machine"
)

// documented is the address of the seat in the documents.
const documented = "192.0.2.1:9780"

// beside puts a seat beside the machine, which becomes a new one.
func (m *machine) beside(start func(*machine)) {
	m.t.Helper()
	seat := newMachine(m.t)
	start(seat)
	seat.meet(m, "cp-2")
}

// besideAnswering puts a seat beside the machine that answers joining machines, and has
// a boot policy for it.
func (m *machine) besideAnswering() {
	m.t.Helper()
	m.beside(serving)
	m.seat().set("join: {listen: 192.0.2.1:9780}")
	m.seat().must("systemctl restart kleidi; kleidi bootpolicy record --file cp-2.yaml")
}

// meet makes this machine the seat of a scene with a new machine.
func (m *machine) meet(next *machine, name string) {
	m.t.Helper()
	m.address = "127.0.0.1:" + node.FreePort(m.t)
	m.cast = map[string]*machine{theSeat: m, theNewMachine: next}
	next.cast, next.name, next.before = m.cast, name, m.before
	next.configure()
	m.write("bin/scp", fmt.Sprintf("#!/bin/sh\n[ \"$2\" = %s: ] && exec cp \"$1\" %s\n", name, next.root("root")), 0o755)
}

func (m *machine) seat() *machine { return m.cast[theSeat] }

// all returns the machines of the scene.
func (m *machine) all() (all []*machine) {
	if m == nil {
		return nil
	}
	if m.cast == nil {
		return []*machine{m}
	}
	for _, other := range m.cast {
		all = append(all, other)
	}
	return all
}

// inMemory puts the machine's /run into memory, as on a real machine.
func (m *machine) inMemory() {
	m.t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "kleidi-docs-")
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	m.remove("run")
	if err := errors.Join(os.Symlink(dir, m.root("run")), os.Mkdir(m.root("run/kleidi"), 0o755)); err != nil {
		m.t.Fatal(err)
	}
}

// joinSeat joins as the documents describe, before a scene begins.
func (m *machine) joinSeat() {
	m.t.Helper()
	r := &reader{t: m.t, where: "the scene", m: m}
	for _, b := range []struct{ on, commands string }{
		{theNewMachine, "kleidi node identity"},
		{theSeat, "kleidi node approve cp-2 --ek sha256:… --boot-policy cp-2.yaml"},
		{theNewMachine, "kleidi join 192.0.2.1:9780 --node cp-2 --verifier sha256:… --trust …"},
	} {
		r.turn(b.on)
		r.run(block{text: b.commands})
	}
}

// share makes two machines the nodes cp-1 and cp-2, in step with a cluster store. The store
// is the part of an API that kleidi uses; e2e/ha has real ones.
func share(first, second *machine) {
	t := first.t
	t.Helper()
	serving(first)
	first.meet(second, "cp-2")
	first.cast["cp-1"], first.cast["cp-2"] = first, second
	first.set("join: {listen: 192.0.2.1:9780}")
	first.must("systemctl restart kleidi; kleidi bootpolicy record --file cp-2.yaml")
	second.joinSeat()
	api, err := kubetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Stop)
	both := []*machine{first, second}
	for _, m := range both {
		m.stop()
		m.write("etc/kleidi/kubeconfig", string(api.Kubeconfig()), 0o600)
		m.set("cluster: {kubeconfig: " + m.root("etc/kleidi/kubeconfig") + "}")
	}
	for _, m := range both {
		m.serveIfPossible()
	}
	for _, m := range both {
		node.Eventually(t, 2*time.Minute, m.name+" is in step", func() error {
			out, err := m.shell("kleidi node list")
			if err == nil && (strings.Count(out, "anchored and announced") != 2 || strings.Contains(out, "it has not")) {
				err = errors.New(out)
			}
			return err
		})
	}
}

// stage stages a KEK on cp-1 while cp-2 is down.
func stage(first, second *machine) {
	first.t.Helper()
	second.stop()
	if out, err := first.shell("kleidi rotate"); err == nil || err.Error() != "exit status 3" {
		first.t.Fatalf("kleidi rotate without cp-2: %v\n%s", err, out)
	}
}
