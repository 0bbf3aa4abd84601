package reseal

import (
	"strings"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/tpm/predict"
)

// NextFiles are the files of the next boot, and of the running one, as flags.
type NextFiles struct {
	Next, Running           BootFiles
	Dbx                     string
	CommandLine             string
	RunningCommandLine      string
	HasLine, HasRunningLine bool
}

// Change reads the files.
func (f *NextFiles) Change() (c predict.Change, err error) {
	read := func(to *[]byte, path string) {
		if path == "" || err != nil {
			return
		}
		*to, err = files.Read(path, predict.MaxFile)
	}
	for _, b := range []struct {
		paths BootFiles
		to    *predict.Files
	}{{f.Next, &c.Next}, {f.Running, &c.Running}} {
		read(&b.to.UKI, b.paths.Uki)
		read(&b.to.Kernel, b.paths.Kernel)
		read(&b.to.Initrd, b.paths.Initrd)
		read(&b.to.GRUBConfig, b.paths.GrubConfig)
	}
	read(&c.Dbx, f.Dbx)
	if f.HasLine {
		c.Next.CommandLine = &f.CommandLine
	}
	if f.HasRunningLine {
		line := strings.TrimSuffix(f.RunningCommandLine, "\n")
		c.Running.CommandLine = &line
	}
	return c, err
}

// BootFiles are the paths of the files of one boot; "" means that the flag was not given.
type BootFiles struct{ Uki, Kernel, Initrd, GrubConfig string }
