package measuredboot

import (
	"flag"
	"fmt"
	"os"
	"testing"
	"time"
)

// shared makes the images of all machines.
var shared *forge

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

var update = flag.Bool("update", false, "write docs/measured-boot.md")

func run(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "kleidi-boot-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if shared, err = newForge(dir); err != nil {
		return 1, err
	}
	begin := time.Now()
	code := m.Run()
	took := time.Since(begin)
	fmt.Printf("\n%d boots in %s\n", len(report.sorted()), took.Round(time.Second))
	report.print(os.Stdout)
	const page = "../../docs/measured-boot.md"
	switch {
	case code != 0:
		return code, nil
	case *update:
		return code, report.write(page, took)
	default:
		return code, report.compare(page)
	}
}
