// Command driver runs in a test machine and executes the steps on the request disk: it
// runs kleidi, and talks KMS v2 to it as kube-apiserver would. It leaves the results
// and kleidi's state folder on the state disk.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
)

func main() {
	err := run()
	fmt.Println("GUEST: driver:", err)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	if err := network(); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	b, err := os.ReadFile(wire.ScriptName)
	if err != nil {
		return err
	}
	var script wire.Script
	if err := json.Unmarshal(b, &script); err != nil {
		return fmt.Errorf("%s: %w", wire.ScriptName, err)
	}
	facts, err := facts()
	if err != nil {
		return err
	}
	m := &machine{results: []wire.Result{{Machine: facts}}}
	for _, step := range script.Steps {
		m.do(step)
	}
	m.stop()
	return m.save()
}

// machine collects the results of the steps.
type machine struct {
	serving *serving
	results []wire.Result
}

func (m *machine) do(step wire.Step) {
	b, _ := json.Marshal(step) // for the console; every field can be marshalled
	fmt.Printf("GUEST: step %.100s\n", b)
	r := wire.Result{Step: &step}
	if err := m.step(step, &r); err != nil {
		r.Error = err.Error()
	}
	fmt.Printf("GUEST: %s %.300s\n", r.Healthz, r.Error)
	m.results = append(m.results, r)
}

func (m *machine) step(step wire.Step, r *wire.Result) error {
	switch {
	case step.Run != nil:
		err := command(step.Run, r)
		for n := 0; n < 20 && err != nil && step.Again != "" && strings.Contains(r.Stderr, step.Again); n++ {
			err = command(step.Run, r)
		}
		return err
	case step.Serve:
		return m.serve(step.Config, r)
	case step.Stop:
		r.Stderr = m.stop()
		return nil
	case step.Encrypt != nil:
		return encrypt(step.Encrypt, r)
	case step.Decrypt != nil:
		return decrypt(step.Decrypt, r)
	case step.Move != nil:
		if err := os.RemoveAll(step.Move[1]); err != nil {
			return err
		}
		return os.Rename(step.Move[0], step.Move[1])
	case step.Copy != nil:
		return copyFile(step.Copy[0], step.Copy[1])
	case step.Forge != nil:
		return forge(*step.Forge)
	case step.Undefine != 0:
		return undefine(step.Undefine)
	}
	return fmt.Errorf("a step that asks for nothing")
}

// save writes the state disk.
func (m *machine) save() error {
	files, err := disk.Collect(wire.StateDir)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	var lines bytes.Buffer
	enc := json.NewEncoder(&lines)
	for _, r := range m.results {
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
	files = append(files, disk.File{Name: wire.ResultsName, Mode: 0o600, Data: lines.Bytes()})
	var archive bytes.Buffer
	if err := disk.Pack(&archive, files); err != nil {
		return err
	}
	f, err := disk.Open(wire.State, os.O_WRONLY)
	if err != nil {
		return err
	}
	if _, err := f.Write(archive.Bytes()); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}
