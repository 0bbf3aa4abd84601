package encryptionconfig

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"text/tabwriter"

	"github.com/beezy-dev/kleidi/seal"
)

// Options selects a move, and the step to take.
type Options struct {
	// From is kube-apiserver's present file. If it is empty, Own's resources are in the clear.
	From string
	Own  EncryptionConfiguration
	To   Target
	// Source is a file from which the target's provider is taken, or empty.
	Source string
	// Step is the step to write into File, or 0 to write nothing.
	Step int
	File string
	// Config is kleidi's configuration for the commands in the report, if it is not the
	// default one.
	Config string
}

// Report describes the step that was written, or all steps.
type Report struct {
	To string `json:"to"`
	// At is the step at which the file was found, or 0 before the first.
	At int `json:"at"`
	// Step is the step that was written.
	Step int    `json:"step,omitempty"`
	File string `json:"file,omitempty"`
	// SHA256 is the digest by which kube-apiserver's metrics name the file.
	SHA256 string `json:"sha256,omitempty"`
	// FormerFile is the path of the copy of the replaced file.
	FormerFile string `json:"formerFile,omitempty"`
	// MadeKey says that a key was generated, so that every node needs a copy of this
	// file.
	MadeKey bool `json:"madeKey,omitempty"`
	// Kept are the resources whose entries did not change.
	Kept []string `json:"kept,omitempty"`
	// Steps begin with the file as it was found, as step 0.
	Steps []Entries `json:"steps"`

	flags  string // of the command for the next step
	config string // the flag that names kleidi's configuration
}

// Entries are the entries of the file at a step.
type Entries struct {
	Step    int     `json:"step"`
	Entries []Entry `json:"entries"`
}

// Entry is an entry without keys. The first provider writes.
type Entry struct {
	Resources []string `json:"resources"`
	Providers []string `json:"providers"`
}

func entriesOf(step int, e *EncryptionConfiguration) Entries {
	s := Entries{Step: step, Entries: []Entry{}}
	for _, r := range e.Resources {
		entry := Entry{Resources: r.Resources, Providers: []string{}}
		for _, p := range r.Providers {
			entry.Providers = append(entry.Providers, p.String())
		}
		s.Entries = append(s.Entries, entry)
	}
	return s
}

// Take shows the steps of a move, or writes one of them.
func Take(o Options) (*Report, error) {
	m, err := o.move()
	if err != nil {
		return nil, err
	}
	r := &Report{To: m.To.String(), At: m.At(), Steps: []Entries{entriesOf(0, m.From)}, flags: o.flags()}
	if o.Config != "" {
		r.config = " --config=" + seal.Quote(o.Config)
	}
	for _, entry := range m.From.Resources {
		if m.Kept(entry) {
			r.Kept = append(r.Kept, entry.Resources...)
		}
	}
	if o.Step != 0 {
		return r, o.write(m, r)
	}
	for step := StepRead; step <= StepOnly; step++ {
		r.Steps = append(r.Steps, entriesOf(step, m.Step(step)))
	}
	return r, nil
}

func (o Options) move() (*Move, error) {
	from, err := o.Own.InClear(), error(nil)
	if o.From != "" {
		if from, err = Read(o.From); errors.Is(err, fs.ErrNotExist) {
			return nil, seal.WithHint(err, "name the file in kube-apiserver's --encryption-provider-config; without such a file leave out --from")
		} else if err != nil {
			return nil, err
		}
	}
	var source *EncryptionConfiguration
	if o.Source != "" {
		if source, err = Read(o.Source); err != nil {
			return nil, err
		}
	}
	return NewMove(from, o.To, source)
}

func (o Options) write(m *Move, r *Report) error {
	switch {
	case o.Step < StepRead || o.Step > StepOnly:
		return seal.Errorf("", "want 1, 2 or 3", "--step %d", o.Step)
	case o.File == "":
		return seal.Errorf("", "name one with --file", "there is no file to write")
	case o.Step == StepOnly && r.At < StepWrite:
		return seal.Errorf("", "write step 2, and have all objects written again (kleidi migrate)", "kube-apiserver does not write with the provider %s yet, and step 3 removes the others", m.To)
	}
	step := m.Step(o.Step)
	w, err := step.Write(o.File)
	if err != nil {
		return err
	}
	r.Step, r.File, r.SHA256, r.FormerFile, r.MadeKey = o.Step, o.File, w.SHA256, w.Former, m.MadeKey()
	r.Steps = append(r.Steps, entriesOf(o.Step, step))
	return nil
}

// flags returns the flags that describe the move, except the one for the present file.
func (o Options) flags() (all string) {
	if o.To.kms == nil {
		all = " --to=" + seal.Quote(o.To.String())
	}
	if o.Source != "" {
		all += " --provider-from=" + seal.Quote(o.Source)
	}
	return all
}

// Skipped reports whether step 1 was skipped.
func (r *Report) Skipped() bool { return r.Step == StepWrite && r.At < StepRead }

// Print prints the report and the next step.
func (r *Report) Print(w io.Writer, from string) {
	if r.Step != 0 {
		r.printStep(w)
		return
	}
	for _, s := range r.Steps {
		switch {
		case s.Step == 0:
			fmt.Fprintln(w, "now")
		case s.Step == r.At:
			fmt.Fprintf(w, "\nstep %d to %s, which is the present one\n", s.Step, r.To)
		default:
			fmt.Fprintf(w, "\nstep %d to %s\n", s.Step, r.To)
		}
		s.print(w)
	}
	switch {
	case r.At == StepOnly:
	case from == "":
		fmt.Fprintf(w, "\nnext: kleidi encryption-config%s%s --step=1, with the resources in --resources, and the file in --file\n", r.flags, r.config)
	case r.At == StepWrite:
		fmt.Fprintln(w, "\nnext:\n  see that every kube-apiserver uses the file")
		r.printMigration(w, from)
	default:
		fmt.Fprintf(w, "\nnext: %s\n", r.command(from, r.At+1))
	}
}

// command returns the command that writes a step.
func (r *Report) command(from string, step int) string {
	return fmt.Sprintf("kleidi encryption-config --from=%s%s%s --step=%d", seal.Quote(from), r.flags, r.config, step)
}

// printMigration prints the commands between step 2 and step 3.
func (r *Report) printMigration(w io.Writer, file string) {
	quoted := seal.Quote(file)
	fmt.Fprintf(w, "  then: kleidi migrate --encryption-config=%s\n", quoted)
	fmt.Fprintf(w, "  the step is over when this command ends with exit code 0: kleidi usage --encryption-config=%s%s\n", quoted, r.config)
	fmt.Fprintln(w, "  then:", r.command(file, StepOnly))
}

func (e Entries) print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, e := range e.Entries {
		also := ""
		if len(e.Providers) > 1 {
			also = "; also read with " + seal.OneLine(strings.Join(e.Providers[1:], ", "), 200)
		}
		fmt.Fprintf(t, "  %s\twritten with %s%s\n", seal.OneLine(strings.Join(e.Resources, ", "), 200), seal.OneLine(e.Providers[0], 100), also)
	}
	t.Flush()
}

func (r *Report) printStep(w io.Writer) {
	fmt.Fprintf(w, "%s: step %d of 3 to %s\n", r.File, r.Step, r.To)
	r.Steps[1].print(w)
	if len(r.Kept) > 0 {
		fmt.Fprintf(w, "left as they were: %s\n", seal.OneLine(strings.Join(r.Kept, ", "), 200))
	}
	if r.FormerFile != "" {
		fmt.Fprintf(w, "the former file is kept as %s; the new one has none of its comments\n", r.FormerFile)
	}
	if r.MadeKey {
		fmt.Fprintln(w, "a key was made for this file: copy the file to the other nodes, since each call of the command makes another key")
	}
	fmt.Fprintln(w, "next:")
	fmt.Fprintln(w, "  put the same file on every control-plane node, and restart kube-apiserver on one node after another")
	fmt.Fprintln(w, "  a kube-apiserver that reloads the file by itself needs no restart; it uses the file once this finds a line:")
	fmt.Fprintf(w, "    kubectl get --raw /metrics | grep encryption_config_controller_last_config_info | grep %s\n", r.SHA256)
	switch r.Step {
	case StepRead:
		fmt.Fprintln(w, "  then:", r.command(r.File, StepWrite))
	case StepWrite:
		r.printMigration(w, r.File)
	default:
		fmt.Fprintln(w, "  keep the former provider's keys as long as you keep backups of etcd from before")
	}
}
