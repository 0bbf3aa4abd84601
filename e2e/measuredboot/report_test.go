package measuredboot

import (
	"bytes"
	"cmp"
	_ "embed"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"text/template"
	"time"
)

// row is one boot in the table.
type row struct {
	Machine, Boot string
	Want, Verdict verdict
	Moved         []int // PCRs that differ from the first boot
	Says          string
	Made, Seed    bool // the DEK seed was made in this boot; it decrypts
	Seconds       float64
	AsExpected    bool
}

// rows are collected from all machines.
type rows struct {
	mu  sync.Mutex
	all []row
}

var report rows

func (r *rows) add(one row) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, one)
}

// sorted puts each machine's boots together, in their order.
func (r *rows) sorted() []row {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := slices.Clone(r.all)
	slices.SortStableFunc(all, func(a, b row) int { return cmp.Compare(a.Machine, b.Machine) })
	return all
}

// PCRs lists the PCRs that moved, for display.
func (r row) PCRs() string {
	return cmp.Or(strings.Trim(strings.ReplaceAll(fmt.Sprint(r.Moved), " ", ", "), "[]"), "–")
}

// Result is the verdict, followed by the expected one if they differ.
func (r row) Result() string {
	if r.AsExpected {
		return string(r.Verdict)
	}
	return fmt.Sprintf("%s (EXPECTED: %s)", cmp.Or(r.Verdict, "?"), r.Want)
}

// Decrypts says whether the DEK seed of the first boot decrypts.
func (r row) Decrypts() string {
	switch {
	case r.Made:
		return "made here"
	case r.Seed:
		return "yes"
	default:
		return "no"
	}
}

// Line is the row in the document.
func (r row) Line() string {
	return fmt.Sprintf("| %s | %s | %s | %s |", r.Boot, r.PCRs(), r.Result(), r.Decrypts())
}

// compare demands that the document contains every row with its result.
func (r *rows) compare(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for _, row := range r.sorted() {
		if !strings.Contains(string(b), row.Line()+"\n") {
			return fmt.Errorf("%s does not have this row; run make measuredboot: %s", path, row.Line())
		}
	}
	return nil
}

// print prints the table to a terminal, with messages and times.
func (r *rows) print(w io.Writer) {
	for _, row := range r.sorted() {
		fmt.Fprintf(w, "%-12s %-62s moved %-10s seed %-9s %5.1f s  %s\n", row.Machine, row.Boot, row.PCRs(), row.Decrypts(), row.Seconds, row.Result())
		if row.Says != "" {
			fmt.Fprintf(w, "             %s\n", row.Says)
		}
	}
}

// chapter is one machine in the document.
type chapter struct {
	Name string
	Rows []row
}

// Refuses says whether any boot was refused.
func (c chapter) Refuses() bool {
	return slices.ContainsFunc(c.Rows, func(r row) bool { return r.Says != "" })
}

//go:embed testdata/measured-boot.md.tmpl
var document string

// write makes the document from the table. It refuses a table with an unexpected
// result.
func (r *rows) write(path string, took time.Duration) error {
	var machines []chapter
	all := r.sorted()
	for _, row := range all {
		if !row.AsExpected {
			return fmt.Errorf("%s is not written: not all boots were as expected", path)
		}
		if n := len(machines); n == 0 || machines[n-1].Name != row.Machine {
			machines = append(machines, chapter{Name: row.Machine})
		}
		last := &machines[len(machines)-1]
		last.Rows = append(last.Rows, row)
	}
	versions, err := versions()
	if err != nil {
		return err
	}
	t, err := template.New("document").Parse(document)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	err = t.Execute(&b, map[string]any{"Boots": len(all), "Minutes": fmt.Sprintf("%.0f", took.Minutes()),
		"Date": time.Now().UTC().Format(time.DateOnly), "Versions": versions, "Machines": machines})
	if err != nil {
		return err
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

// versions lists the versions of the programs in the boots.
func versions() ([]string, error) {
	var all []string
	for name, version := range shared.parts.versions {
		all = append(all, name+" "+version)
	}
	out, err := output("dpkg-query", "-W", "-f", "${Package} ${Version}\n", "ovmf", "qemu-system-x86", "swtpm")
	if err != nil {
		return nil, err
	}
	all = append(all, strings.Split(strings.TrimSpace(out), "\n")...)
	if out, err = output(kleidiBinary(), "version"); err != nil {
		return nil, err
	}
	slices.Sort(all)
	return append(all, strings.TrimSpace(out)), nil
}
