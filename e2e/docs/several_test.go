package docs

import (
	"errors"
	"fmt"
	"os"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// Scenes of several machines. A document's comment says on which of them its commands
// run.

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

// inMemory puts /run of the machine into memory, as it is on a real one.
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

// joinSeat joins as the documents say, before a scene begins.
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
